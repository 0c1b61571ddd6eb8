"""FP16 models, which an Ascend 310P runs: vllm-ascend's own classes for it, two versions, on our files and on those of
msmodelslim, and what both producers make of the same model."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qat.checkpoints.layouts import open_export
from qat.checkpoints.layouts.ascend.write import fold_bias, in_half
from qat.checkpoints.simulated import check_engine
from tests.ascend.conftest import config
from tests.ascend.exchanged import KINDS
from tests.ascend.places import ENGINES, by_engine, by_msmodelslim
from tests.ascend.test_consumer import LAYERS
from tests.ascend.test_producer import stored
from tests.checkpoints.exports import export_pair, rewrite
from tests.tiny import tiny_model

pytestmark = pytest.mark.ascend
NAMES = {"W8A8_DYNAMIC": "AscendW8A8DynamicLinearMethod310", "W8A8": "AscendW8A8LinearMethod310"}
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
DEQ = f"{Q}.deq_scale"
Said = Callable[[str, str, str], tuple[dict[str, Any], dict[str, torch.Tensor]]]
Ours = Callable[[str], tuple[Path, nn.Module]]
Theirs = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with one layer and biases, in FP16."""
    root = tmp_path_factory.mktemp("half")
    folder = tiny_model("qwen3", root / "model", num_hidden_layers=1, attention_bias=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    described = json.loads((folder / "config.json").read_text())
    described |= {"dtype": "float16", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(described))
    rewrite(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    return folder


@pytest.fixture(scope="module")
def theirs(model: Path) -> Theirs:
    """What msmodelslim writes of it."""
    return cache(lambda name: by_msmodelslim(model, model.parent / name, config(KINDS[name])))


@pytest.fixture(scope="module")
def ours(model: Path) -> Ours:
    """Our export, and the model that it is of."""

    @cache
    def make(name: str) -> tuple[Path, nn.Module]:
        out, how = model.parent / f"ours-{name}", {"activation_rule": "ascend_310p", "round_bf16": False}
        return out, export_pair(model, out, KINDS[name].pair, "ascend", **how)

    return make


@pytest.fixture(scope="module")
def x(model: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = {f"model.layers.0.{name}": torch.randn(7, n, generator=generator).half() for name, n in LAYERS.items()}
    save_file(x, model.parent / "inputs.safetensors")
    return x


@pytest.fixture(scope="module")
def consumed(model: Path, x: dict[str, torch.Tensor], ours: Ours, theirs: Theirs) -> Said:
    """What an engine says of a folder, and its outputs: (version, whose files, type)."""
    root = model.parent

    @cache
    def every(version: str) -> dict[tuple[str, str], dict[str, Any]]:
        folders = {("ours", name): ours(name)[0] for name in NAMES} | {("theirs", name): theirs(name) for name in NAMES}
        jobs = [
            [str(folder), str(root / "inputs.safetensors"), str(place(version, *key))]
            for key, folder in folders.items()
        ]
        return dict(zip(folders, by_engine(version, "_310P", jobs, root), strict=True))

    def place(version: str, whose: str, name: str) -> Path:
        return root / f"{version}-{whose}-{name}.safetensors"

    def said(version: str, whose: str, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        answer = every(version)[whose, name]
        assert "error" not in answer, answer
        return answer, load_file(place(version, whose, name))

    return said


@pytest.mark.parametrize("version", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_our_files(name: str, version: str, consumed: Said, x: dict[str, torch.Tensor], ours: Ours) -> None:
    """Its own class takes every tensor; outputs are those of fake quantization, rounded once to FP16: at most 2^-11
    apart in norm, and 2^-10 |y| + 2^-11 rms(y) each. W8A8_DYNAMIC's class has two parameters that it never reads."""
    answer, y = consumed(version, "ours", name)
    static = name == "W8A8"
    assert answer["checked"] == sorted(KINDS[name].operators)
    for path, layer in answer["layers"].items():
        assert layer == {
            "scheme": NAMES[name],
            "missing": [] if static else ["input_offset", "input_scale"],
            "derived": ["weight_offset", "weight_scale"] if static else [],
            "unexpected": [],
        }, path
    for path, given in x.items():
        with torch.no_grad():
            truth = ours(name)[1].get_submodule(path)(given.float())
        apart, rms = (y[path].float() - truth).abs(), truth.square().mean().sqrt()
        assert y[path].dtype == torch.float16 and apart.norm() <= 2.0**-11 * truth.norm(), path
        assert (apart <= 2.0**-10 * truth.abs() + 2.0**-11 * rms).all(), path


@pytest.mark.parametrize("version", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_files_of_msmodelslim(
    name: str, version: str, consumed: Said, x: dict[str, torch.Tensor], model: Path, theirs: Theirs
) -> None:
    """The engine computes what our reader says that these files mean. Its `deq_scale` has no bits to
    cut off either: it multiplies scales in FP16."""
    answer, y = consumed(version, "theirs", name)
    exported = open_export(theirs(name))
    assert {layer["scheme"] for layer in answer["layers"].values()} == {NAMES[name]}
    if name == "W8A8":
        raw = exported.layer(Q)["deq_scale"]
        assert raw.dtype == torch.int64 and not bool((raw & 0x1FFF).any() | (raw >> 32).any())
        assert "7 layers load on 310p" in check_engine(exported, "vllm-ascend")
        return
    dense = load_file(model / "model.safetensors")
    for path, given in x.items():
        truth = given.float() @ dense[f"{path}.weight"].float().t() + dense.get(f"{path}.bias", torch.zeros(())).float()
        assert (y[path].float() - truth).norm() < 0.03 * truth.norm(), path


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tensors_and_description(name: str, ours: Ours, theirs: Theirs) -> None:
    one, other = stored(theirs(name)), stored(ours(name)[0])
    for key in [key for key in one if key.endswith(".bias")]:
        one[key] = one[key].half()  # as we store it; it widens it
    assert {key: (t.dtype, t.shape) for key, t in other.items()} == {key: (t.dtype, t.shape) for key, t in one.items()}
    file = "quant_model_description.json"
    described = json.loads((theirs(name) / file).read_text())
    assert described.pop("metadata") == described.pop("optional") == {}
    assert json.loads((ours(name)[0] / file).read_text()) == described


def test_the_coding_of_its_scales_is_ours(theirs: Theirs) -> None:
    """From its integers to numbers and back by our writer: the same integers, where nothing of them is cut off."""
    raw = stored(theirs("W8A8"))[DEQ]
    whole = raw & ~0x1FFF
    values = whole.int().view(torch.float32)
    assert torch.equal(in_half({"deq_scale": values})["deq_scale"], whole)
    own = stored(theirs("W8A8"))
    start = -own[f"{Q}.input_offset"].long() * own[f"{Q}.weight"].long().sum(dim=1)
    exact = {"quant_bias": start.int(), "deq_scale": raw.int().view(torch.float32)}
    folded = fold_bias(exact, own[f"{Q}.bias"])["quant_bias"]
    part = (folded - start).abs()
    assert part.max() > 100 and ((folded - own[f"{Q}.quant_bias"]).abs() <= 2**-10 * part + 1).all()


def test_a_wrong_sign_is_noticed(consumed: Said, x: dict[str, torch.Tensor], ours: Ours, model: Path) -> None:
    """The comparison above is able to fail: an offset negated, an integer that is a number instead of its bits."""
    folder = ours("W8A8")[0]
    changes = (("input_offset", torch.neg), ("deq_scale", lambda t: t.int().view(torch.float32)))
    for number, change in enumerate(changes):
        tensors = stored(folder)
        changed = {f"{path}.{change[0]}" for path in x}
        other = model.parent / f"damaged-{number}"
        other.mkdir()
        for file in ("config.json", "quant_model_description.json"):
            (other / file).write_bytes((folder / file).read_bytes())
        made = {name: change[1](t).clone() if name in changed else t for name, t in tensors.items()}
        save_file(made, other / "model.safetensors")
        out = model.parent / f"damaged-{number}.safetensors"
        job = [str(other), str(model.parent / "inputs.safetensors"), str(out)]
        (said,) = by_engine(ENGINES[1], "_310P", [job], other)
        if "error" in said:
            assert "AssertionError: deq_scale" in said["error"]
            continue
        y = load_file(out)
        for path, given in x.items():
            with torch.no_grad():
                truth = ours("W8A8")[1].get_submodule(path)(given.float())
            assert (y[path].float() - truth).norm() > 2.0**-8 * truth.norm(), path
