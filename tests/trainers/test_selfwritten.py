"""What the teacher writes: the same documents however many are written at a time, and chats in its own template."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qat.errors import DataError
from qat.trainers import selfwritten
from qat.trainers.selfwritten import Generate, template, write
from qat.trainers.tokens import Tokens
from tests.tiny import tiny_model, tiny_tokenizer

COLD = {"temperature": 0.01, "precision": "fp32"}  # as good as the likeliest token each time


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_model("llama", tmp_path_factory.mktemp("teacher"), num_hidden_layers=1, initializer_range=0.3)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stream(teacher: Any, settings: dict[str, Any], **limits: Any) -> list[Tokens]:
    generate = Generate.model_validate(settings)
    given = {"seq_len": 40, "seed": 3, "advance": lambda count: None, **limits}
    return list(write(teacher, tiny_tokenizer(), generate, **given))


def same(one: list[Tokens], other: list[Tokens]) -> bool:
    pairs = zip(one, other, strict=False)
    return all(np.array_equal(a.ids, b.ids) and np.array_equal(a.learn, b.learn) for a, b in pairs)


@pytest.mark.parametrize("chats", [0.0, 0.5])
def test_documents_do_not_depend_on_how_they_are_written(
    teacher: Any, chats: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest token each time, since what is drawn depends on what is drawn beside it."""
    monkeypatch.setattr(selfwritten, "_drawn", lambda chances, _: chances.argmax(1))
    one = stream(teacher, {**COLD, "batch": 1, "chats": chats}, documents=12)
    assert len(one) == 12 and len({len(document.ids) for document in one}) > 1  # rows begin anew at other times
    for batch in (3, 5, 50):
        assert same(one, several := stream(teacher, {**COLD, "batch": batch, "chats": chats}, documents=12))
        assert len(several) == 12
    monkeypatch.setattr(selfwritten, "apart", lambda *_: False)
    in_step = stream(teacher, {**COLD, "batch": 5, "chats": chats}, documents=12)
    assert len(in_step) == 12 and same(one, in_step)


def test_writing_ends_when_there_is_enough(teacher: Any) -> None:
    grown: list[int] = []
    found = stream(teacher, {**COLD, "batch": 4}, wanted=200, advance=grown.append)
    written = sum(len(document.ids) for document in found)
    assert 200 <= written < 200 + 4 * 40 and sum(grown) == written - len(found)  # the random first tokens are not its
    settings, given = Generate(precision="fp32", batch=4), {"seq_len": 40, "seed": 3, "advance": grown.append}
    endless = write(teacher, tiny_tokenizer(), settings, **given)
    assert len(list(itertools.islice(endless, 30))) == 30
    endless.close()  # type: ignore[attr-defined]  # a generator


def test_a_share_of_documents_is_chats(teacher: Any) -> None:
    shapes = [document.shape for document in stream(teacher, {**COLD, "batch": 8, "chats": 0.25}, documents=16)]
    assert shapes.count("written chat") == 4 and shapes[3] == "written chat"


def test_a_chat_is_the_template_with_two_turns_of_the_teachers(teacher: Any) -> None:
    tokenizer = tiny_tokenizer()
    around = template(tokenizer)
    ends = {tokenizer.eos_token_id, around.after[0]}
    answered = 0
    for document in stream(teacher, {**COLD, "batch": 8, "chats": 1.0}, documents=16):
        ids, learn = document.ids.tolist(), document.learn.tolist()
        begin = len(around.before)
        assert ids[:begin] == around.before and not any(learn[:begin])
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([ids])).logits[0]
        logits[begin - 1, sorted(ends)] = -torch.inf  # no turn is empty
        likely = logits.argmax(1).tolist()
        assert all(ids[i] == likely[i - 1] for i in range(begin, len(ids)) if learn[i])
        fixed = [i for i in range(begin, len(ids)) if not learn[i]]
        assert fixed == list(range(fixed[0], fixed[-1] + 1))
        forced = [ids[i] for i in fixed]
        ended = ids[fixed[0] - 1] == around.after[0]  # by the teacher; else half a row was enough
        assert forced == (around.after[1:] if ended else around.after) and (ended or fixed[0] == 20)
        assert not set(ids[begin : fixed[0] - 1]) & ends and not set(ids[fixed[-1] + 1 : -1]) & ends
        assert len(ids) == 40 or ids[-1] in ends
        answered += len(ids) > fixed[-1] + 1
    assert answered == 16


def test_templates_that_do_not_say_where_a_turn_ends() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has none; set generate\.chats to 0"):
        template(tokenizer)
    tokenizer.chat_template = "{{ '[INST]' + messages[0]['content'] + ' [/INST]' }}"
    with pytest.raises(DataError, match=r"ends a user's turn with ' \[/INST\]'"):
        template(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(DataError, match="once and as it is"):
        template(tokenizer)


def test_rows_too_short_for_the_template(teacher: Any) -> None:
    with pytest.raises(DataError, match=r"raise data\.seq_len to \d+ or more"):
        stream(teacher, {**COLD, "chats": 1.0}, seq_len=10, documents=1)


def test_what_is_drawn_has_its_chances(teacher: Any) -> None:
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(40_000, -1).contiguous()
    found = selfwritten._drawn(chances, torch.Generator().manual_seed(0))
    shares = torch.bincount(found, minlength=4) / len(found)
    assert shares[1] == 0 and (shares - chances[0]).abs().max() < 0.01


def test_bf16_writes_almost_the_same(teacher: Any) -> None:
    exact, rounded = (
        stream(teacher, {**COLD, "batch": 6, "precision": precision}, documents=12) for precision in ("fp32", "bf16")
    )
    agree = [a.ids[:12].tolist() == b.ids[:12].tolist() for a, b in zip(exact, rounded, strict=True)]
    assert sum(agree) >= 6
    assert next(teacher.parameters()).dtype == torch.float32
