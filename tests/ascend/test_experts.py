"""vllm-ascend's own code on the experts of our files, two versions: it chooses the scheme, loads every tensor, puts
weights into its order and multiplies, over a second reading of the grouped operators."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.checkpoints.simulated import load_simulated
from tests.ascend.places import ENGINES, by_engine
from tests.checkpoints.exports import Pair
from tests.checkpoints.test_simulated_experts import EXPERTS, apart, export_experts, one_by_one, routed, tiny
from tests.checkpoints.test_simulated_mx_experts import one_by_one as mx_one_by_one

pytestmark = pytest.mark.ascend
INTEGERS = ["npu_dynamic_quant", "npu_grouped_matmul"]
MX = ["npu_dynamic_mx_quant", "npu_grouped_matmul"]
FUSED = [*MX, "npu_grouped_matmul_swiglu_quant_v2"]
TYPES: dict[str, tuple[Pair, str, str, list[str]]] = {  # formats, scheme, device, operators whose shapes were checked
    "W8A8_DYNAMIC": (("int8_channel", "int8_token"), "AscendW8A8DynamicFusedMoEMethod", "A2", INTEGERS),
    "W4A8_DYNAMIC": (("int4_channel", "int8_token"), "AscendW4A8DynamicFusedMoEMethod", "A2", INTEGERS),
    "W8A8_MXFP8": (("mxfp8", "mxfp8"), "AscendW8A8MXFP8DynamicFusedMoEMethod", "A5", FUSED),
    "W4A4_MXFP4": (("mxfp4", "mxfp4"), "AscendW4A4MXFP4DynamicFusedMoEMethod", "A5", FUSED),
    "W4A8_MXFP": (("mxfp4", "mxfp8"), "AscendW4A8MXFPDynamicFusedMoEMethod", "A5", MX),
}
every_engine = pytest.mark.parametrize("version", ENGINES)
every_type = pytest.mark.parametrize("name", TYPES)
Change = Callable[[Tensor], Tensor]
DAMAGE: dict[str, tuple[str, Change]] = {
    "neighbours' scales": ("weight_scale", lambda scales: scales.roll(1, dims=0)),
    "shifted rows": ("weight", lambda codes: codes.roll(1, dims=0)),
    "shifted groups": ("weight_scale", lambda scales: scales.roll(1, dims=1)),
    "swapped nibbles": ("weight", lambda codes: codes << 4 | codes >> 4),
}
EXCHANGED: dict[str, tuple[str, str]] = {
    "gates and what they gate": (".gate_proj.", ".up_proj."),
    "experts in another order": (".experts.1.", ".experts.2."),
}


def damages(name: str) -> list[str]:
    """What can be wrong with files of a type."""
    pair, _, device, _ = TYPES[name]
    impossible = {"shifted groups"} if device == "A2" else set()
    impossible |= {"swapped nibbles"} if pair[0] != "mxfp4" else set()
    return [what for what in (*DAMAGE, *EXCHANGED) if what not in impossible]


DAMAGED = [(what, name) for name in TYPES for what in damages(name)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("experts")
    source = tiny("qwen3_moe", root)

    @cache
    def make(name: str) -> Path:
        if name == "source":
            return source
        export_experts(source, root / name, TYPES[name][0])
        return root / name

    return make


@pytest.fixture(scope="module")
def consumed(
    exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], tuple[dict[str, Any], Tensor]]:
    """What an engine says of our files of a type, or of damaged ones, and its outputs."""
    scratch = tmp_path_factory.mktemp("consumed")

    @cache
    def of(version: str, device: str) -> dict[tuple[str, str], tuple[dict[str, Any], Path]]:
        keys = [(name, what) for name in TYPES if TYPES[name][2] == device for what in ("", *damages(name))]
        given = scratch / "inputs.safetensors"
        save_file(dict(zip(("x", "chosen", "shares"), inputs(), strict=True)), given)
        outs = [scratch / f"{version}-{device}-{number}.safetensors" for number in range(len(keys))]
        folders = [damaged(exported(name), scratch / f"{name} {what}", what) for name, what in keys]
        jobs = [[str(f), EXPERTS, str(given), str(out)] for f, out in zip(folders, outs, strict=True)]
        said = by_engine(version, device, jobs, scratch, "consume_experts.py")
        return dict(zip(keys, zip(said, outs, strict=True), strict=True))

    def one(version: str, name: str, what: str) -> tuple[dict[str, Any], Tensor]:
        said, out = of(version, TYPES[name][2])[name, what]
        assert "error" not in said, said
        return said, load_file(out)["y"]

    return one


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return routed(4, 128)


def damaged(folder: Path, out: Path, what: str) -> Path:
    """The folder, with one thing wrong in every matrix of an expert."""
    if not what:
        return folder
    if not out.exists():
        out.mkdir()
        for file in folder.glob("*.json"):
            (out / file.name).write_bytes(file.read_bytes())
        (file,) = folder.glob("*.safetensors")
        save_file(dict(wrong(*one, what) for one in load_file(file).items()), out / file.name)
    return out


def wrong(name: str, tensor: Tensor, what: str) -> tuple[str, Tensor]:
    """A tensor of experts under another one's name, or changed."""
    if what in EXCHANGED:
        one, other = EXCHANGED[what]
        return (name.replace(one, other) if one in name else name.replace(other, one)), tensor
    suffix, change = DAMAGE[what]
    return name, change(tensor) if name.endswith(f".{suffix}") and ".experts." in name else tensor


def of(folder: Path, y: Tensor, pair: Pair) -> float:
    """How far outputs are from fake quantization, in units of the bound."""
    reference = mx_one_by_one if pair[0].startswith("mx") else one_by_one
    return apart(y, *reference(folder, "qwen3_moe", *inputs(), pair))


@every_engine
@every_type
def test_our_files(name: str, version: str, exported: Any, consumed: Any) -> None:
    pair, scheme, _, checked = TYPES[name]
    said, y = consumed(version, name, "")
    assert said == {"scheme": scheme, "missing": [], "unexpected": [], "checked": checked}
    assert of(exported(name), y, pair) <= 1
    own = load_simulated(exported(name)).get_submodule(EXPERTS)(*inputs())
    same = float((own == y).float().mean())
    assert same > 0.99 and of(exported(name), own, pair) <= 1, same  # sums of shares in another order


@pytest.mark.parametrize(("what", "name"), DAMAGED)
def test_damage_is_noticed(what: str, name: str, exported: Any, consumed: Any) -> None:
    assert of(exported(name), consumed(ENGINES[1], name, what)[1], TYPES[name][0]) > 10


PORTABLE = [  # targets that engines for NVIDIA load, too, and the first version that does here
    ("compressed-tensors", "W8A8_DYNAMIC", ENGINES[0]),
    ("compressed-tensors", "W8A8_MXFP8", ENGINES[1]),
    ("compressed-tensors", "W4A4_MXFP4", ENGINES[1]),
    ("modelopt", "W8A8_MXFP8", ENGINES[1]),
]


@every_engine
def test_portable_files(version: str, exported: Any, tmp_path: Path) -> None:
    """The same experts in layouts for both sides, by the engine's real dispatch: the numbers of those above, or, in a
    version without a scheme for them, its refusal."""
    given = tmp_path / "inputs"
    save_file(dict(zip(("x", "chosen", "shares"), inputs(), strict=True)), given)
    for device in ("A2", "A5"):
        own = [(target, name, since) for target, name, since in PORTABLE if TYPES[name][2] == device]
        jobs = []
        for target, name, _ in own:
            folder = tmp_path / f"{target}-{name}"
            export_experts(exported("source"), folder, TYPES[name][0], target)
            jobs.append([str(folder), EXPERTS, str(given), str(folder / "y")])
        said = by_engine(version, device, jobs, tmp_path, "consume_experts.py")
        for (_, name, since), answer, job in zip(own, said, jobs, strict=True):
            if version < since:
                assert answer["error"].startswith("NotImplementedError"), answer
                continue
            pair, scheme, _, checked = TYPES[name]
            assert "error" not in answer and answer["unexpected"] == [], answer
            assert answer["scheme"] == scheme and answer["checked"] == checked
            assert of(exported(name), load_file(job[3])["y"], pair) <= 1


@every_engine
def test_odd_numbers_of_groups_do_not_load(version: str, exported: Any, tmp_path: Path) -> None:
    """First matrices cut to three groups of 32: scales cannot become pairs. (0.30.0rc2 pads those of W4A4_MXFP4.)"""
    names = [name for name in TYPES if TYPES[name][2] == "A5" and (name != "W4A4_MXFP4" or version == ENGINES[0])]
    jobs = []
    for name in names:
        folder, out = exported(name), tmp_path / name
        out.mkdir()
        for file in folder.glob("*.json"):
            (out / file.name).write_bytes(file.read_bytes())
        (file,) = folder.glob("*.safetensors")
        save_file({path: cut(path, tensor) for path, tensor in load_file(file).items()}, out / file.name)
        save_file(dict(zip(("x", "chosen", "shares"), inputs(), strict=True)), out / "inputs")
        jobs.append([str(out), EXPERTS, str(out / "inputs"), str(out / "y")])
    for said in by_engine(version, "A5", jobs, tmp_path, "consume_experts.py"):
        assert said["error"].startswith("RuntimeError: shape '[4, "), said


def cut(path: str, tensor: Tensor) -> Tensor:
    """Three of four groups of a first matrix, and as many rows of a second."""
    if ".experts." not in path:
        return tensor
    dim = 0 if ".down_proj." in path else 1
    return tensor.narrow(dim, 0, tensor.shape[dim] // 4 * 3).contiguous()
