"""Prompts and answers: who says which, and inputs that are rounded by it."""

import pytest
import torch

from qat.errors import TrainingError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.observers import Observer
from qat.quantizer import InputQuantizer
from qat.training.activations import fake_quantize_input
from qat.training.phases import Phase, answering, mixes, split_documents

OBSERVER: Observer = "minmax"
RANGE = torch.tensor([-1.0, 2.0])


def quantizer(name: str = "int8_mix") -> InputQuantizer:
    made = InputQuantizer(lookup(name), "ascend", "ste", OBSERVER)
    if made.needs_calibration:
        made.amax.copy_(RANGE)
    return made


def alone(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"answer": quantizer("int8_tensor_asym")(x), "prompt": quantizer("int8_token")(x)}


@pytest.mark.parametrize("phase", ["prompt", "answer"])
def test_all_tokens_alike(phase: Phase) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with answering(phase), answering(lambda: torch.zeros(2, 5, dtype=torch.bool)):  # the outer one is right
        assert torch.equal(quantizer()(x), alone(x)[phase])
    assert not torch.equal(*alone(x).values())


def test_by_token_with_its_gradient() -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask, asked = torch.tensor([[True, False, True, False, False], [False, False, True, True, True]]), []
    with answering(lambda: asked.append(0) or mask):  # type: ignore[func-returns-value]  # counts
        y = quantizer()(x)
        flat = quantizer()(x.view(1, 10, 64))  # as flash attention wants rows
    wanted = torch.where(mask[..., None], alone(x)["answer"], alone(x)["prompt"])
    assert torch.equal(y, wanted) and torch.equal(flat.view_as(y), wanted) and len(asked) == 1
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with answering(lambda: mask), pytest.raises(TrainingError, match=r"\[3, 64\] do not have the 10 tokens"):
        quantizer()(x[0, :3])


def test_generation_with_a_cache() -> None:
    """Where nobody says it: several tokens are a prompt, one is a part of an answer."""
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer()(x), alone(x)["prompt"])
    assert torch.equal(quantizer()(x[:, :1]), alone(x[:, :1])["answer"])
    assert mixes(torch.nn.ModuleList([quantizer()])) and not mixes(torch.nn.ModuleList([quantizer("int8_token")]))


def test_no_other_rule() -> None:
    with pytest.raises(UnsupportedError, match="int8_mix inputs have activation_rule: ascend, not vllm"):
        fake_quantize_input(torch.randn(2, 64), lookup("int8_mix"), "vllm", "ste", RANGE)


def test_documents() -> None:
    """A chat (prompt of 3, answer of 3), a text of 4 and a padded end; by hand."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    learnt = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]]).bool()
    chat, text = [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]
    assert split_documents(positions, learnt).int().tolist() == [[*chat, *text]]
    one = torch.arange(8)[None].repeat(2, 1)
    learnt = torch.ones(2, 8, dtype=torch.bool)
    learnt[1, :2] = False  # its second token is not learnt: a prompt of three
    learnt[:, 7] = False
    found = split_documents(one, learnt).int().tolist()
    assert found == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    assert not split_documents(one, nothing).any()
