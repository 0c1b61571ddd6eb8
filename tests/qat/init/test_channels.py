"""Which channels are one set, and which are free: by names that people know, on real (tiny) architectures."""

import pytest
import torch
from torch import Tensor, nn

from qat.init.channels import Channels, channels
from tests.qat.test_surgery import MOE, build, ids


def by_name(model: nn.Module) -> dict[tuple[str, int], Channels]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = channels(model, ids()[:1])
    return {(names[id(member.parameter)], member.dim): each for each in found for member in each.members}


def test_the_channels_of_a_llama() -> None:
    model = build("llama", tie_word_embeddings=True)
    of = by_name(model)
    stream = of["model.embed_tokens.weight", 1]
    layers = {
        f"model.layers.{i}.{name}.weight": dim
        for i in range(2)
        for name, dim in {
            **{f"self_attn.{n}_proj": 1 for n in "qkv"},
            **{f"mlp.{n}_proj": 1 for n in ("gate", "up")},
            **{"self_attn.o_proj": 0, "mlp.down_proj": 0, "input_layernorm": 0, "post_attention_layernorm": 0},
        }.items()
    }
    expected = {"model.embed_tokens.weight": 1, "model.norm.weight": 0, **layers}
    assert {key for key, each in of.items() if each is stream} == set(expected.items()) and not stream.why
    inner = of["model.layers.0.mlp.down_proj.weight", 1]
    assert of["model.layers.0.mlp.gate_proj.weight", 0] is inner is of["model.layers.0.mlp.up_proj.weight", 0]
    assert len(inner.members) == 3 and not inner.why
    assert of["model.layers.0.self_attn.q_proj.weight", 0].why == "view"  # split into heads
    assert of["model.embed_tokens.weight", 0].why == "embedding"


@pytest.mark.parametrize(
    ("kind", "table"), [("gpt2", "transformer.wpe.weight"), ("opt", "model.decoder.embed_positions.weight")]
)
def test_tables_of_positions_and_biases_are_members(kind: str, table: str) -> None:
    of = by_name(build(kind))
    stream = of[table, 1]
    biases = [name for name, _ in (key for key, each in of.items() if each is stream) if name.endswith("bias")]
    assert not stream.why and len(biases) > 6


def test_a_split_fixes_what_it_reads() -> None:
    of = by_name(build("phi3", pad_token_id=0))
    assert of["model.layers.0.mlp.gate_up_proj.weight", 0].why == "chunk"
    assert not of["model.embed_tokens.weight", 1].why


def test_experts() -> None:
    of = by_name(build("qwen3_moe", **MOE))
    stream = of["model.embed_tokens.weight", 1]
    assert not stream.why and of["model.layers.0.mlp.gate.weight", 1] is stream
    assert of["model.layers.0.mlp.experts.gate_up_proj", 2] is stream is of["model.layers.0.mlp.experts.down_proj", 1]
    assert of["model.layers.0.mlp.experts.down_proj", 2].why == "chunk"


class Peek(nn.Module):
    """Reads one channel by its number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x[..., :1].sigmoid()


def test_who_reads_a_channel_by_its_number_fixes_all() -> None:
    model = build("llama")
    model.model.layers[1].mlp = Peek(model.model.layers[1].mlp)
    assert by_name(model)["model.embed_tokens.weight", 1].why == "getitem"


class Constant(nn.Module):
    """Adds a vector that is no parameter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("vector", torch.linspace(0, 1, 128))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.vector


def test_a_vector_of_unknown_origin_fixes_what_it_is_added_to() -> None:
    model = build("llama")
    model.model.layers[0].mlp = Constant(model.model.layers[0].mlp)
    of = by_name(model)
    assert of["model.embed_tokens.weight", 1].why == "add" and not of["model.layers.0.mlp.inner.up_proj.weight", 0].why
