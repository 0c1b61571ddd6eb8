"""Assistant turns in the renderings of real models' kinds of templates, written down here by their shapes.

Each template is rendered on chats with several turns; what is learnt must be what follows the generation prompt.
"""

import json
import warnings
from typing import Any

import pytest

from qat.errors import DataError
from qat.trainers.records import Document
from qat.trainers.tokens import encode
from tests.tiny import tiny_tokenizer

SYSTEM, ONE, TWO = ({"role": role, "content": text} for role, text in
                    (("system", "Be brief."), ("user", "One?"), ("user", "Two?")))  # fmt: skip


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CHAT = (ONE, said("Answer one."), TWO, said("Answer two."))

# DeepSeek-R1: the prompt opens a thought, the history keeps what follows </think> and nothing else.
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<|output|>' + m.content + '<|output_end|>' }}"
    "{% elif m.tool_calls %}{{ '<|Assistant|>' + (m.content or '') }}"
    "{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.function.name + '\n' + c.function.arguments + '<|call_end|>' }}"
    "{% endfor %}{{ '<|end|>' }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Qwen3 thinking: the last answer gets a thought, as the prompt does; earlier ones lose theirs.
QWEN = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = (m.content or '').split('</think>') %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + parts[:-1] | join | replace('<think>', '') | trim + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1] | trim }}"
    '{% for c in m.tool_calls or [] %}{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_THOUGHT = QWEN.replace("assistant\n<think>\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")
# ChatML whose prompt alone holds an empty thought, or words that no history holds.
PLAIN_HISTORY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
PRIMED = PLAIN_HISTORY.replace("<think>\n\n</think>\n\n", "Let me think: ")
# gpt-oss: a channel before the answer, and another token after the last one.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if 'tool_calls' in m %}{{ '<|head|>assistant<|head_end|>\n\n' }}{% set c = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + c.name + '\", \"parameters\": ' + c.arguments | tojson + '}<|eot|>' }}"
    "{% else %}{{ '<|head|>' + m.role + '<|head_end|>\n\n' + m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|head_end|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Phi: without a generation prompt the text is closed, which in the middle of a chat it is not.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
LOST = "Answer two.<|im_end|>"
THOUGHT = "</think>\n\nAnswer two.<|im_end|>"


def spans(template: str, messages: tuple[Any, ...], *, added: bool = True, **more: Any) -> list[str]:
    """The text of every run of learnt tokens; with `added` the template's tags are tokens of their own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if added:
        marks = "<|User|> <|Assistant|> <|end|> <think> </think> <|start|> <|channel|> <|message|> <|return|> <|head|> "
        marks += "<|head_end|> <|eot|> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|endoftext|> <|call|>"
        tokenizer.add_tokens(marks.split(), special_tokens=True)
    (found,) = encode(iter([Document("here", messages=messages, **more)]), tokenizer)
    runs: list[list[int]] = []
    for token, learn, before in zip(found.ids, found.learn, [False, *found.learn], strict=False):
        if learn and not before:
            runs.append([])
        if learn:
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("added", [True, False], ids=["tags are tokens", "tags are text"])
@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        (R1, "Answer one.<|end|>", "Answer two.<|end|>"),
        (QWEN, "Answer one.<|im_end|>", "\n" + THOUGHT),
        (NO_THOUGHT, "Answer one.<|im_end|>", LOST),
        (PLAIN_HISTORY, "Answer one.<|im_end|>", LOST),
        (PRIMED, "Answer one.<|im_end|>", LOST),
        (GPT_OSS, "<|channel|>final<|message|>Answer one.", "<|channel|>final<|message|>Answer two.<|return|>"),
        (LLAMA, "Answer one.<|eot|>", "Answer two.<|eot|>"),
        (GEMMA, "Answer one.<end_of_turn>", "Answer two.<end_of_turn>"),
        (MISTRAL, " Answer one.<|im_end|>", " Answer two.<|im_end|>"),
        (PHI, "Answer one.<|end|>", "Answer two.<|end|>\n<|endoftext|>"),
    ],
    ids=["r1", "qwen3", "no thought", "plain history", "primed", "gpt-oss", "llama", "gemma", "mistral", "phi"],
)
def test_turns_of_known_kinds_of_templates(template: str, first: str, last: str, added: bool) -> None:
    found = spans(template, CHAT, added=added)
    if not added and template in (GEMMA, PHI, R1, LLAMA):  # white space after a tag that is no token is kept
        found, first, last = ([text.rstrip() for text in found], first, last)
    if template is QWEN:  # a token that begins inside the prompt's line end is not learnt
        found = [text.lstrip("\n") for text in found]
        last = last.lstrip("\n")
    assert found == [first, last]


@pytest.mark.parametrize("content", ["<div>", "<think>", "<think>\nx", "<", "A", "B", "<tool_call>", "\n<think>\n"])
@pytest.mark.parametrize("template", [R1, PLAIN_HISTORY, PRIMED], ids=["r1", "plain history", "primed"])
@pytest.mark.parametrize("added", [True, False])
def test_content_that_begins_like_the_prompt_is_learnt_whole(content: str, template: str, added: bool) -> None:
    """What the prompt holds already is the prompt's, and all else is the answer's, down to one character."""
    prompt = "<think>\n" if template is R1 else "Let me think: " if template is PRIMED else "<think>\n\n</think>\n\n"
    end = "<|end|>" if template is R1 else "<|im_end|>"
    (found, *_) = spans(template, (ONE, said(content + " x"), TWO, said("y")), added=added)
    whole = content + " x" + end
    assert found.rstrip("\n") in (whole, whole.removeprefix(prompt))


def test_a_thought_that_the_template_drops_is_said_and_not_learnt() -> None:
    with pytest.warns(UserWarning, match="leaves out a part of what assistants wrote"):
        assert spans(R1, (ONE, said("<think>\nlong\n</think>Short."))) == ["Short.<|end|>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = spans(QWEN, (ONE, said("<think>\nlong\n</think>\n\nShort.")))
    assert found == "long\n</think>\n\nShort.<|im_end|>"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_key_of_its_own_is_learnt_or_said_to_be_lost(key: str) -> None:
    thought = {**said("Short."), key: "long"}
    shown = LLAMA.replace("m.content | trim", "(m.reasoning_content or '') + m.content")
    assert spans(shown, (ONE, thought)) == ["longShort.<|eot|>"]
    with pytest.warns(UserWarning, match="leaves out a part of what assistants wrote"):
        assert spans(LLAMA, (ONE, thought)) == ["Short.<|eot|>"]


def test_messages_that_the_template_does_not_show_are_said() -> None:
    developer = {"role": "developer", "content": "Speak like a pirate."}
    without = LLAMA.replace("for m in messages", "for m in messages if m.role != 'developer'")
    with pytest.warns(UserWarning, match="does not show messages of the role developer"):
        assert spans(without, (developer, ONE, said("Aye."))) == ["Aye.<|eot|>"]
    # Mistral 7B v0.3: the system's text stands before the user's last message, and only while that is the last one.
    system = {"role": "system", "content": "Speak like a pirate."}
    last = MISTRAL.replace("'[INST] ' +", "'[INST] ' + (messages[0].content if loop.last else '') +").replace(
        "{% else %}", "{% elif m.role == 'assistant' %}"
    )
    with pytest.raises(DataError, match=r"the message of the role system only while .* the first message of the user"):
        spans(last, (system, ONE, said("Aye.")))


def test_turns_of_weight_0_are_not_learnt() -> None:
    """OpenAI's and Mistral's data say so where an answer is only context."""
    messages = (ONE, {**said("Answer one."), "weight": 0}, TWO, {**said("Answer two."), "weight": 1})
    assert spans(LLAMA, messages) == ["Answer two.<|eot|>"]
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(DataError, match="weight 0 cannot be separated"):
        spans(marked, messages)


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (QWEN, (ONE, said("<think>\nlong\n</think>\n\nShort."), TWO, said("End.")), "rewrites message 1"),
        # another header than the prompt's
        (PLAIN_HISTORY.replace("m.role +", "m.role | replace('assistant', 'bot') +"), CHAT, "message 1 differently"),
        # a prompt with words, and words of its own in the history
        (GPT_OSS.replace("assistant' }}", "assistant<|channel|>analysis<|message|>' }}"), CHAT, "differently"),
    ],
)
def test_what_is_uncertain_is_refused(template: str, messages: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        spans(template, messages)
    assert says in str(caught.value) and "one sample per assistant turn" in str(caught.value)


# ---- tools

TOOL = {"name": "weather", "description": "Now", "parameters": {"type": "object", "properties": {"city": {}}}}
CALLED = {"name": "weather", "arguments": {"city": "Rome"}}
CALLING = (
    ONE,
    said("", tool_calls=[{"id": "1", "type": "function", "function": CALLED}]),
    {"role": "tool", "content": "mild", "tool_call_id": "1"},
    said("It is mild."),
)


@pytest.mark.parametrize("flat", [True, False])
def test_tools_reach_the_template_and_calls_are_learnt(flat: bool) -> None:
    messages: Any = CALLING
    if flat:
        messages = (ONE, said("", tool_calls=[CALLED]), *CALLING[2:])
    tool: Any = TOOL if flat else {"type": "function", "function": TOOL}
    first, second = spans(QWEN, messages, tools=(tool,))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert first.lstrip("\n") == "</think>\n\n" + call and second.lstrip("\n") == "</think>\n\nIt is mild.<|im_end|>"
    # R1 writes arguments as they are and so wants their text; Llama looks whether the key tool_calls is there.
    assert spans(R1, messages) == ['<|call|>weather\n{"city": "Rome"}<|call_end|><|end|>', "It is mild.<|end|>"]
    assert spans(LLAMA, messages)[0] == '{"name": "weather", "parameters": {"city": "Rome"}}<|eot|>'
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN
    (found,) = encode(iter([Document("here", messages=messages, tools=(tool,))]), tokenizer)
    assert json.dumps({"type": "function", "function": TOOL}) in tokenizer.decode(found.ids)


def test_a_call_in_the_middle_of_a_chat_is_found_where_only_the_last_turn_gets_a_thought() -> None:
    """Qwen3: an empty thought stands before the last turn, and before turns that come with their reasoning."""
    hybrid = QWEN.replace("loop.index0 > ns.last", "loop.last or loop.index0 > ns.last and m.reasoning_content")
    hybrid = hybrid.replace("{{ '<|im_start|>assistant\n<think>\n' }}", "{{ '<|im_start|>assistant\n' }}")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    thought = "<think>\n\n</think>\n\nIt is mild.<|im_end|>"
    for added in (True, False):
        assert spans(hybrid, CALLING, added=added) == [call, thought]
        found = spans(hybrid, (*CALLING, TWO, said("Answer two.")), added=added)
        assert found == [call, "It is mild.<|im_end|>", "<think>\n\n</think>\n\nAnswer two.<|im_end|>"]
        empty = spans(hybrid, (ONE, said(""), TWO, said("")), added=added)
        assert empty == ["<|im_end|>", "<think>\n\n</think>\n\n<|im_end|>"]


def test_arguments_never_come_out_in_pythons_notation() -> None:
    printed = R1.replace("+ c.function.arguments +", "~ c.function.arguments ~")
    assert spans(printed, CALLING)[0] == '<|call|>weather\n{"city": "Rome"}<|call_end|><|end|>'


def test_a_template_without_tools_refuses_for_its_own_reason() -> None:
    """Not because of the form in which calls were tried first."""
    with pytest.raises(DataError, match="roles must alternate"):
        spans(GEMMA, CALLING)


def test_calls_that_a_template_drops_are_refused_and_tools_are_noted() -> None:
    without = R1.replace("+ c.function.arguments", "+ ''")
    for template, what in ((PHI, "does not show tool calls"), (without, "does not show the arguments")):
        with pytest.raises(DataError, match=what) as caught:
            spans(template, CALLING)
        assert "here" in str(caught.value)
    with pytest.warns(UserWarning, match="does not show tools"):
        assert spans(PHI, (ONE, said("x")), tools=(TOOL,)) == ["x<|end|>\n<|endoftext|>"]


def test_named_templates_are_chosen_by_tools() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": LLAMA, "tool_use": QWEN}
    for tools, mark in (((TOOL,), "im_start"), ((), "head")):
        (found,) = encode(iter([Document("here", messages=(ONE, said("x")), tools=tools)]), tokenizer)
        assert mark in tokenizer.decode(found.ids)
    tokenizer.chat_template = {"a": LLAMA, "b": QWEN}
    with pytest.raises(DataError, match=r"here: .*multiple chat templates"):
        list(encode(iter([Document("here", messages=(ONE, said("x")))]), tokenizer))


# ---- context


def test_of_a_prompt_with_turns_only_the_completion_is_learnt() -> None:
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    for template in (PLAIN_HISTORY, marked):
        assert spans(template, CHAT, context=3) == [LOST]
        assert spans(template, (*CHAT, TWO, said("C")), context=3) == [LOST, "C<|im_end|>"]
    assert spans(PLAIN_HISTORY, (said("Hello."), *CHAT), context=4) == [LOST]


def test_white_space_of_a_header_is_not_learnt_where_offsets_are_trimmed() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (found,) = encode(iter([Document("here", messages=(ONE, said("Answer.")))]), tokenizer)
    assert tokenizer.decode(found.ids[found.learn]) == "Answer.<|im_end|>"
