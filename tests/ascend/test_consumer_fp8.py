"""FP8 in blocks and ModelOpt's MXFP8 inside vllm-ascend's own classes: its configs choose the method, which loads every
tensor, makes of the weights what each device multiplies, and computes what is documented."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.numbers.catalog import lookup
from qat.sites import weights
from qat.training.activations import fake_quantize_input
from tests.ascend.conftest import Exported
from tests.ascend.places import ENGINES, by_engine
from tests.ascend.test_consumer import LAYERS

pytestmark = pytest.mark.ascend
MX = ["npu_dynamic_mx_quant", "npu_quant_matmul"]
FOLDERS = {
    "fp8": (("fp8_b128", "fp8_g128"), "vllm", "AscendFp8BlockLinearMethod"),
    "modelopt": (("mxfp8", "mxfp8"), "ascend", "AscendW8A8MXFP8DynamicLinearMethod"),
}
Answer = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def x() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"model.layers.0.{name}": torch.randn(7, n, generator=generator).bfloat16() for name, n in LAYERS.items()}


@pytest.fixture(scope="module")
def consumed(x: dict[str, torch.Tensor], exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an engine says of a target's folder on a device, and its outputs: one process per engine and device; as
    "neighbours" FP8 whose scales are those of the next block."""
    scratch = tmp_path_factory.mktemp("consumed-fp8")
    save_file(x, scratch / "inputs.safetensors")

    @cache
    def of_device(version: str, device: str) -> dict[str, Answer]:
        folders = {target: folder(exported, target) for target in FOLDERS}
        folders["neighbours"] = neighbours(folders["fp8"], scratch / "neighbours")
        outs = {target: scratch / f"{version}-{device}-{target}.safetensors" for target in folders}
        jobs = [[str(folders[one]), str(scratch / "inputs.safetensors"), str(outs[one])] for one in folders]
        said = by_engine(version, device, jobs, scratch)
        return {
            one: (what, load_file(outs[one]) if "layers" in what else {}) for one, what in zip(outs, said, strict=True)
        }

    return of_device


def folder(exported: Exported, target: str) -> Path:
    pair, rule, _ = FOLDERS[target]
    return exported("W8A8_MXFP8", target, pair, rule)[0]


def neighbours(fp8: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    (out / "config.json").write_bytes((fp8 / "config.json").read_bytes())
    (file,) = fp8.glob("*.safetensors")
    tensors = {n: t.roll(1) * 1.25 if n.endswith("weight_scale_inv") else t for n, t in load_file(file).items()}
    save_file(tensors, out / file.name)
    return out


def mxfp8(x: torch.Tensor) -> torch.Tensor:
    """As the device rounds it: the floor rule, half to even."""
    return fake_quantize_input(x, lookup("mxfp8"), "ascend", "ste", None)


def truth(model: torch.nn.Module, path: str, given: torch.Tensor, how: str) -> torch.Tensor:
    """A layer's product in float32: as trained; or of BF16 weights with inputs as they are, or both in MXFP8."""
    with torch.no_grad():
        layer = model.get_submodule(path)
        if how == "trained":
            read = layer.input_quantizer(given.float())  # type: ignore[operator]  # a quantizer
            trained: torch.Tensor = layer.weight_quantizer.linear(read, layer.matrix("weight"), layer.bias)  # type: ignore[operator,union-attr]  # a quantizer
            return trained  # not rounded to BF16 yet
        weight = weights(model)[path].value().to(torch.bfloat16).float()
        pair = (given.float(), weight) if how == "dense" else (mxfp8(given.float()), mxfp8(weight))
        return torch.nn.functional.linear(*pair, layer.bias)


def furthest(found: dict[str, torch.Tensor], model: torch.nn.Module, x: dict[str, torch.Tensor], how: str) -> float:
    """The largest difference of an element, over 2^-7 |y| + 2^-8 rms(y)."""
    worst = 0.0
    for path, given in x.items():
        y = truth(model, path, given, how)
        bound = 2.0**-7 * y.abs() + 2.0**-8 * y.square().mean().sqrt()
        worst = max(worst, float(((found[path].float() - y).abs() / bound).max()))
    return worst


@pytest.mark.parametrize(
    ("target", "device", "how", "operators"),
    [
        ("fp8", "A2", "dense", []),
        ("fp8", "A5", "mxfp8", MX),
        ("modelopt", "A5", "trained", MX),
    ],
)
def test_our_files(
    target: str,
    device: str,
    how: str,
    operators: list[str],
    consumed: Any,
    x: dict[str, torch.Tensor],
    exported: Exported,
) -> None:
    """Every tensor is taken, and each element of every output within half of the bound of MX types. What else the
    device could have computed is more than ten times outside."""
    pair, rule, scheme = FOLDERS[target]
    said, y = consumed(ENGINES[1], device)[target]
    assert "error" not in said, said
    assert said["checked"] == operators
    assert set(said["layers"]) == set(x)
    for layer in said["layers"].values():
        assert layer == {"scheme": scheme, "missing": [], "derived": [], "unexpected": []}
    model = exported("W8A8_MXFP8", target, pair, rule)[1]
    assert furthest(y, model, x, how) <= 0.5
    others = {"dense", "mxfp8", "trained"} - {how}
    assert all(furthest(y, model, x, other) > 10 for other in others)


def test_how_far_fp8_blocks_are_from_what_was_trained(
    consumed: Any, x: dict[str, torch.Tensor], exported: Exported
) -> None:
    """The figures of docs/ascend.md: on A2 inputs are not rounded; on 950 weights are rounded once more."""
    model = exported("W8A8_MXFP8", "fp8", *FOLDERS["fp8"][:2])[1]
    for device, low, high in (("A2", 0.02, 0.03), ("A5", 0.045, 0.065)):
        y = consumed(ENGINES[1], device)["fp8"][1]
        for path, given in x.items():
            wanted = truth(model, path, given, "trained")
            assert low < float((y[path].float() - wanted).norm() / wanted.norm()) < high, (device, path)


@pytest.mark.parametrize(("device", "how"), [("A2", "dense"), ("A5", "mxfp8")])
def test_scales_of_neighbours_are_noticed(
    device: str, how: str, consumed: Any, x: dict[str, torch.Tensor], exported: Exported
) -> None:
    said, y = consumed(ENGINES[1], device)["neighbours"]
    assert "error" not in said
    assert furthest(y, exported("W8A8_MXFP8", "fp8", *FOLDERS["fp8"][:2])[1], x, how) > 10


def test_the_older_engine_takes_neither(consumed: Any) -> None:
    """0.23.0.post1 knows `fp8` as DeepSeek V4's alone, whose config it asks for its groups, and no ModelOpt files."""
    said = consumed(ENGINES[0], "A5")
    assert said["fp8"][0]["error"].startswith("AttributeError") and "o_groups" in said["fp8"][0]["error"]
    assert said["modelopt"][0]["error"].startswith("NotImplementedError: vllm-ascend has none of")
