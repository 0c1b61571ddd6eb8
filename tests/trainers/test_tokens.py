"""Which tokens of a text or a chat are learnt, for templates that behave well and for those that do not."""

from typing import Any

import pytest
from tokenizers import processors

from qat.errors import DataError
from qat.trainers.sources import Document
from qat.trainers.tokens import Tokens, encode, fingerprint
from tests.tiny import tiny_tokenizer

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Answer one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Answer two."},
)
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT_SYSTEM = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nDefault<|im_end|>\n' }}{% endif %}"
    + TURN
    + "{% endfor %}"
    + PROMPT
)
# As Qwen3: the turn after the last question gets a reasoning block, earlier ones lose theirs.
REASONING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}"
    "{% endfor %}" + PROMPT
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
# Without special tokens: the line end is what says that a turn is over.
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# The system message moves into the last question, as in some Mistral templates.
MOVING = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST]' + m.content }}{% if loop.index0 > messages|length - 3 %}{{ messages[0].content }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def one(messages: tuple[dict[str, Any], ...], template: str | None = None) -> tuple[Tokens, Any]:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template or None
    (found,) = encode(iter([Document("here", messages=messages)]), tokenizer)
    return found, tokenizer


def learnt(found: Tokens, tokenizer: Any) -> list[str]:
    """The text of every run of learnt tokens."""
    runs: list[list[int]] = []
    for token, learn, before in zip(found.ids, found.learn, [False, *found.learn], strict=False):
        if learn and not before:
            runs.append([])
        if learn:
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs]


TURNS = ["Answer one.<|im_end|>", "Answer two.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (None, TURNS),
        (DEFAULT_SYSTEM, TURNS),
        (REASONING, [TURNS[0], "<think>\n\n</think>\n\n" + TURNS[1]]),
        (MARKED, TURNS),
        (PLAIN, ["Answer one.\n", "Answer two.\n"]),
    ],
    ids=["chatml", "default system", "reasoning", "marked", "plain"],
)
@pytest.mark.parametrize("system", [True, False])
def test_every_assistant_turn_is_learnt_and_nothing_else(template: str | None, turns: list[str], system: bool) -> None:
    messages = CHAT if system else CHAT[1:]
    found, tokenizer = one(messages, template)
    assert learnt(found, tokenizer) == turns
    whole = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)["input_ids"]
    assert found.ids.tolist() == whole


def test_a_chat_without_assistant_has_nothing_to_learn() -> None:
    found, _ = one(CHAT[:2])
    assert len(found.ids) and not found.learn.any()


def test_assistant_turns_in_a_row_and_repeated_contents() -> None:
    found, tokenizer = one((CHAT[1], CHAT[2], CHAT[2], {"role": "user", "content": "Answer one."}, CHAT[2]))
    assert learnt(found, tokenizer) == [TURNS[0], TURNS[0], TURNS[0]]


REASONED = (CHAT[1], {"role": "assistant", "content": "<think>long</think>short"}, CHAT[3], CHAT[4])


@pytest.mark.parametrize(
    ("messages", "template", "says"),
    [
        (CHAT, "", ["no chat template", "chat: never"]),
        (CHAT, MOVING, ["renders what precedes message 2 differently", "one sample per assistant turn"]),
        (REASONED, REASONING, ["rewrites message 1", "one sample per assistant turn"]),
        (CHAT, STRICT, ["System role not supported", "system, user"]),
        (CHAT, MARKED.replace("== 'assistant'", "== 'nobody'"), ["generation marks cover no token"]),
    ],
    ids=["no template", "moving", "reasoning dropped", "refusing", "empty marks"],
)
def test_uncertain_chats_are_refused(messages: Any, template: str, says: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        one(messages, template)
    assert all(part in str(caught.value) for part in ["here", *says]), str(caught.value)


def test_texts_end_with_exactly_one_eos_and_keep_their_order() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["plain", "ends already<|im_end|>", "", "a\n\nb"]
    documents = [
        Document("x", texts[0]),
        Document("x", messages=CHAT),
        *(Document("x", text) for text in texts[1:]),
    ]
    found = list(encode(iter(documents), tokenizer))
    assert [tokenizer.decode(item.ids) for item in found] == [
        "plain<|im_end|>",
        tokenizer.apply_chat_template(list(CHAT), tokenize=False),
        "ends already<|im_end|>",
        "<|im_end|>",
        "a\n\nb<|im_end|>",
    ]
    assert all(item.learn.all() for item in found[2:])


def test_bos_comes_from_the_tokenizer_and_eos_only_if_there_is_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.eos_token = None
    (found,) = encode(iter([Document("x", "text")]), tokenizer)
    assert tokenizer.decode(found.ids) == "<|im_start|>text"


def test_the_fingerprint_follows_what_matters_only() -> None:
    tokenizer = tiny_tokenizer()
    first = fingerprint(tokenizer)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer) == first == fingerprint(tiny_tokenizer())
    tokenizer.chat_template = MARKED
    second = fingerprint(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    assert len({first, second, fingerprint(tokenizer)}) == 3
