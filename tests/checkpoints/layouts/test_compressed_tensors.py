"""The compressed-tensors layout, one tensor at a time: bytes, pairs of formats and config entries, against the library.

The oracles are compressed-tensors' own decompressors and pydantic classes, and our independent unpacker.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from qat.checkpoints.layouts import TargetLayer, open_export
from qat.checkpoints.layouts.compressed_tensors import write as target
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.stored import bit_stream
from qat.checkpoints.layouts.support import pairs
from qat.checkpoints.shards import ShardWriter
from qat.errors import UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, quantize
from tests.checkpoints.exports import (
    TARGET,
    UNIFORM,
    Pair,
)

WEIGHTS = sorted({weight for weight, _ in pairs(target.ROWS)})
SHAPES = [(96, 256), (37, 128), (130, 384), (5, 100), (200, 300)]
CASES = [(name, shape) for name in WEIGHTS for shape in SHAPES if lookup(name).divides(shape[1])]


# --- bytes ----------------------------------------------------------------------------------------


def random_qtensor(name: str, rows: int, columns: int) -> QTensor:
    generator = torch.Generator().manual_seed(rows * columns)
    spread = torch.exp(torch.randn(rows, 1, generator=generator))
    return quantize(torch.randn(rows, columns, generator=generator) * spread + 0.1, lookup(name))


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_bytes_are_what_compressed_tensors_reads(name: str, shape: tuple[int, int]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    q, how = random_qtensor(name, *shape), target.layout(lookup(name))
    tensors = target.pack(q)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=how.weights, format=how.format)
    compressor = compressors.BaseCompressor.get_value_from_registry(how.format)
    theirs = compressor.decompress({key: tensor.clone() for key, tensor in tensors.items()}, scheme)["weight"]
    assert theirs.dtype == torch.bfloat16 and torch.equal(theirs, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_independent_unpacker_agrees(name: str, tmp_path: Path) -> None:
    q = random_qtensor(name, 150, 256)
    how = target.layout(lookup(name))
    with ShardWriter(tmp_path / "out") as writer:
        for key, tensor in target.pack(q).items():
            writer.add(f"a.{key}", tensor)
        config = {"quantization_config": target.quantization_config([TargetLayer("a", (150, 256), q.format, None)], [])}
        (writer.folder / "config.json").write_text(json.dumps(config))
    folder = open_export(tmp_path / "out")
    assert folder.modules == {"a": PackedModule("a", how.format, how.weights, None)}
    assert torch.equal(folder.dense("a"), q.dequantize(torch.bfloat16))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_bit_streams_are_little_endian(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stream = bit_stream(codes, bits, multiple=4)
    assert stream.shape == (3, 4 * math.ceil(37 * bits / 32))
    for row, packed in zip(codes.tolist(), stream.tolist(), strict=True):
        assert sum(code << (bits * k) for k, code in enumerate(row)) == int.from_bytes(bytes(packed), "little")


def test_nvfp4_and_static_inputs_store_divisors_and_scales() -> None:
    q, amax = random_qtensor("nvfp4", 32, 64), torch.tensor(5.0)
    tensors = target.pack(q, lookup("nvfp4"), amax)
    assert tensors["weight_global_scale"].shape == tensors["input_global_scale"].shape == (1,)
    assert float(tensors["weight_global_scale"] * q.scales.global_scale) == 1.0
    assert float(tensors["input_global_scale"]) == 2.0 ** math.floor(math.log2(6 * 448 / 5))
    static = target.pack(random_qtensor("fp8_channel", 32, 64), lookup("fp8_tensor"), amax)["input_scale"]
    assert static.dtype == torch.bfloat16 and static.shape == (1,)
    assert float(static) == pytest.approx(5 / 448, rel=2**-8)


# --- which pairs ----------------------------------------------------------------------------------


def test_the_target_offers_what_it_should() -> None:
    assert set(UNIFORM) <= set(pairs(target.ROWS))
    refused = {"nf4_g64", "if4", "nvint4", "mxint4", "mxint8", "int8_token", "fp8_token", "fp8_g128"}
    assert refused.isdisjoint(WEIGHTS) and refused <= CATALOG.keys()
    assert all(a is None for w, a in pairs(target.ROWS) if w.endswith("_asym"))
    assert [a for w, a in pairs(target.ROWS) if w == "nvfp4"] == [None, "nvfp4"]


@pytest.mark.parametrize(
    ("weight", "input", "nearest"),
    [
        ("nf4_g64", None, "int4_g64"),
        ("nvint4", None, "int4_g32"),
        ("mxint8", "mxint8", "int8_g32"),
        ("fp8_token", None, "fp8_channel"),
        ("int4_g64", "nvfp4", "int4_token"),
        ("nvfp4", "int8_token", "nvfp4"),
        ("fp8_channel", "fp8_g128", "fp8_token"),
        ("int4_g64_asym", "int8_token", "none"),
        ("int8_channel", "int8_channel", "int8_token"),
    ],
)
def test_refusals_name_the_nearest(weight: str, input: str | None, nearest: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        target.layout(lookup(weight), lookup(input) if input else None)
    text = str(caught.value)
    assert TARGET in text and weight in text and nearest in text.rpartition(":")[2]


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", pairs(target.ROWS), ids=str)
def test_configs_parse_and_carry_nothing_unknown(pair: Pair) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weight, input = lookup(pair[0]), lookup(pair[1]) if pair[1] else None
    config = target.quantization_config([TargetLayer("model.layers.0.a", (256, 256), weight, input)], ["lm_head"])
    parsed = quantization.QuantizationConfig.model_validate(config)
    group = parsed.config_groups["group_0"]
    assert parsed.quantization_status.value == "compressed" and parsed.ignore == ["lm_head"]
    assert group.weights.num_bits == weight.element.bits and group.weights.symmetric != weight.zero_point
    assert (group.input_activations is None) == (input is None)
    known = {"targets", "weights", "input_activations", "output_activations", "format"}
    assert set(config["config_groups"]["group_0"]) == known


def test_targets_are_disjoint_and_complete() -> None:
    paths = [f"model.layers.{n}.{leaf}" for n in range(12) for leaf in ("attn.q_proj", "mlp.down_proj")] + ["lm_head"]
    chosen = [p for p in paths if p.endswith("q_proj") or ".1." in p or p == "lm_head"]
    patterns = target.patterns(chosen, paths)

    def matched(found: list[str]) -> list[str]:
        return [p for p in paths if any(re.match(f.removeprefix("re:"), p) for f in found)]

    rest = [p for p in paths if p not in chosen]
    assert matched(patterns) == chosen and matched(target.patterns(rest, paths)) == rest
    assert r"re:.*\.layers\.\d+\.attn\.q_proj$" in patterns  # also below a wrapper
    experts = [f"model.layers.{n}.experts.{e}.up" for n in range(3) for e in range(3)]
    odd = [experts[0], experts[4]]
    assert [e for e in experts if any(re.match(p[3:], e) for p in target.patterns(odd, experts))] == odd
