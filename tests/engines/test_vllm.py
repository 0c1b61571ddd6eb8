"""Exports served by vLLM with our plugin, in vLLM's own interpreter (QAT_VLLM_PYTHON, see `make test-vllm`): every
linear layer of a checkpoint that holds every pair of formats, against the independent reader's dense weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.support import pairs
from qat.numbers.catalog import lookup
from qat.serving.packed import problem
from tests.checkpoints.exports import export_pair, mixed_rules, pair_rules, quantized, quiet_export
from tests.tiny import tiny_model

PYTHON = os.environ.get("QAT_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="no vLLM here, and QAT_VLLM_PYTHON names no Python that has it"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROOT = Path(__file__).parents[2]
SECONDS = 900
PAIRS = [pair for pair in pairs(ROWS) if problem(lookup(pair[0])) is None]
HEAD = ("int8_g64", "int8_token")
VOCABULARY = 400  # vLLM makes 448 rows of it
EIGHT_BITS = (("int8_channel", "int8_token"), ("int8_channel", "int8_tensor"), ("fp8_channel", "fp8_token"))
LAYER = "model.layers.0.mlp.up_proj"
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "zero": ({"weight_scale": torch.zeros(256, 2, dtype=torch.bfloat16)}, "weight_scale must be finite and positive"),
    "nan": ({"weight_scale": torch.full((256, 2), torch.nan, dtype=torch.bfloat16)}, "weight_scale must be finite"),
    "no_scale": ({"weight_scale": None}, "weight_scale is missing"),
    "no_codes": ({"weight_packed": None}, "weight_packed is missing"),
    "double": ({"weight_scale": torch.full((256, 2), 0.1, dtype=torch.float64)}, "weight_scale is torch.float64"),
}


def ours(weight: str, input: str | None) -> bool:
    """What the plugin takes on a CPU whatever the CPU is: not what vLLM multiplies in 8 bits, nor W4A16 integers."""
    w = lookup(weight)
    return (weight, input) not in EIGHT_BITS and not (
        input is None and w.element.kind == "integer" and w.element.bits == 4
    )


def run(folder: Path, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    given, found = folder / "tasks.json", folder / "found.json"
    given.write_text(json.dumps(tasks))
    script = Path(__file__).with_name("vllm_layers.py")
    done = subprocess.run(
        [PYTHON, str(script), str(given), str(found)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert found.is_file(), (done.stdout + done.stderr)[-4000:]
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    loaded: list[dict[str, Any]] = json.loads(found.read_text())
    return loaded


def broken(source: Path, out: Path, changes: dict[str, Tensor | None]) -> Path:
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(f"{LAYER}.{name}")
        if value is not None:
            tensors[f"{LAYER}.{name}"] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("vllm")
    source = tiny_model("llama", root / "source", num_hidden_layers=-(-len(PAIRS) // 4), vocab_size=VOCABULARY)
    rules = [*mixed_rules(PAIRS), pair_rules(*HEAD, match="lm_head"), {"match": "*", "skip": "rest"}]
    mixed = quiet_export(quantized(source, rules), source, root / "mixed")
    small = tiny_model("llama", root / "small", num_hidden_layers=1)
    plain = root / "plain"
    export_pair(small, plain, ("int4_g64", "int8_token"))
    rotated = root / "rotated"
    export_pair(small, rotated, ("mxfp4", "mxfp4"), init=("hadamard",))
    damaged = {name: broken(plain, root / name, changes) for name, (changes, _) in BROKEN.items()}
    folders = {"mixed": mixed, "plugin": plain, "stock": plain, "rotated": rotated, **damaged}
    options = {"stock": {"quantization": "compressed-tensors"}, "rotated": {"quantization": "qat"}}
    tasks = [{"folder": str(folder), "options": options.get(name, {})} for name, folder in folders.items()]
    return {**dict(zip(folders, run(root, tasks), strict=True)), "log": (root / "log.txt").read_text()}


def test_every_pair_is_served(found: dict[str, Any]) -> None:
    assert found["mixed"].get("error") is None
    served = {(row["weight"], row["input"]): row["scheme"] for row in found["mixed"]["rows"]}
    assert len(found["mixed"]["rows"]) > 0 and found["mixed"]["tokens"] == 4
    for pair in PAIRS:
        key = (weight_name(pair[0]), pair[1])
        if ours(*pair):
            assert served[key] == "Packed", pair
        elif pair[1] is not None:
            assert served[key] != "Packed", pair


def weight_name(name: str) -> str:
    """Ternary codes are stored as INT2, and read as such."""
    return name.replace("ternary", "int2")


def test_layers_are_the_dense_layers(found: dict[str, Any]) -> None:
    """48 tokens: the very product of the dense weights. 5: one rounding of the result, where weights are exact in BF16
    (FP4), and the rounding of the dense weights besides, where the kernel is the more exact of the two."""
    packed = [row for row in found["mixed"]["rows"] if row["scheme"] == "Packed"]
    assert any(len(row["members"]) == 3 for row in packed) and any(row["members"] == ["lm_head"] for row in packed)
    for row in packed:
        exact, rounded = row["excess"]
        assert row["equal"], row
        assert (exact if lookup(row["weight"]).exact_in_bf16 else rounded) <= 1, row
        assert row["held"] == [], row
    for row in found["mixed"]["rows"]:
        assert row["distance"] < 0.01, row


def test_the_log_names_who_serves_each_pair_once(found: dict[str, Any]) -> None:
    lines = [line.partition("qat: ")[2] for line in found["log"].splitlines() if "qat: " in line]
    assert lines and len(lines) == len(set(lines))
    assert sum(line.startswith("nvfp4 weights with nvfp4 inputs: qat::packed_linear") for line in lines) == 1
    assert any(line.startswith("int8_channel weights with int8_token inputs: vLLM's") for line in lines)


def test_naming_the_method_gives_vllm_back(found: dict[str, Any]) -> None:
    assert {row["scheme"] for row in found["plugin"]["rows"]} == {"Packed"}
    assert found["stock"].get("error") is None
    assert "Packed" not in {row["scheme"] for row in found["stock"]["rows"]}


def test_rotated_inputs_are_refused(found: dict[str, Any]) -> None:
    assert "--quantization qat does not rotate inputs (transform_config)" in found["rotated"]["error"]


@pytest.mark.parametrize("name", BROKEN)
def test_bad_tensors_are_named(name: str, found: dict[str, Any]) -> None:
    assert f"{LAYER}.{BROKEN[name][1]}" in found[name]["error"]
