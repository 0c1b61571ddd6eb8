"""vllm-ascend's own classes, two versions, on files: they choose a scheme, load every tensor, put weights into their
device's order and compute, over operators simulated from their documents, whose shapes torch_npu's rules confirm."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.checkpoints.exported import load_exported
from qat.engines.transformers import load_packed
from qat.numbers.catalog import lookup
from qat.training.phases import answering
from tests.ascend.conftest import Exported, Model, Produced
from tests.ascend.exchanged import DECODES, KINDS, PORTABLE, STATIC
from tests.ascend.places import ENGINES, by_engine
from tests.checkpoints.exports import broken

pytestmark = pytest.mark.ascend
LAYERS = {"self_attn.q_proj": 128, "self_attn.o_proj": 128, "mlp.gate_proj": 128, "mlp.down_proj": 256}
PRODUCED = [name for name, kind in KINDS.items() if kind.produced]
every_engine = pytest.mark.parametrize("version", ENGINES)
DAMAGE = {
    ("swapped nibbles", "W4A4_MXFP4"): ("weight", lambda codes: codes << 4 | codes >> 4),
    ("shifted groups", "W4A4_MXFP4"): ("weight_scale", lambda scales: scales.roll(1, dims=1)),
    ("wrong sign of the offset", "W8A8"): ("input_offset", torch.neg),
}
Consumed = Callable[[str, str, str], tuple[dict[str, Any], Path]]


@pytest.fixture(scope="session")
def x(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """BF16 inputs of the layers that are run."""
    generator = torch.Generator().manual_seed(3)
    return {f"model.layers.0.{name}": torch.randn(7, n, generator=generator).bfloat16() for name, n in LAYERS.items()}


@pytest.fixture(scope="session")
def consumed(
    x: dict[str, torch.Tensor], produced: Produced, exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Consumed:
    """What an engine says of a folder, and its outputs: (version, whose files, type). One process per device."""
    scratch = tmp_path_factory.mktemp("consumed")
    save_file(x, scratch / "inputs.safetensors")

    @cache
    def of_device(version: str, device: str) -> dict[tuple[str, str], dict[str, Any]]:
        names = [name for name, kind in KINDS.items() if kind.device == device]
        folders = {("theirs", name): produced(name) for name in names if KINDS[name].produced}
        folders |= {("ours", name): exported(name)[0] for name in names}
        folders |= {("portable", name): exported(name, "compressed-tensors")[0] for name in names if name in PORTABLE}
        folders |= {("static", name): exported(*STATIC)[0] for name in names if name == STATIC[0]}
        folders |= {("decode", name): exported(name)[0] for name in names if name == "W8A8_MIX"}
        folders |= {(what, name): damaged(exported(name)[0], scratch, what) for what, name in DAMAGE if name in names}
        jobs = [
            [str(folder), str(scratch / "inputs.safetensors"), str(place(version, *key)), "decode"][
                : 3 + (key[0] == "decode")
            ]
            for key, folder in folders.items()
        ]
        return dict(zip(folders, by_engine(version, device, jobs, scratch), strict=True))

    def place(version: str, whose: str, name: str) -> Path:
        return scratch / f"{version}-{whose}-{name}.safetensors"

    return lambda version, whose, name: (
        of_device(version, KINDS[name].device)[whose, name],
        place(version, whose, name),
    )


def damaged(folder: Path, scratch: Path, what: str) -> Path:
    """The folder with one thing wrong in every quantized layer."""
    (suffix, change), *_ = [how for (named, _), how in DAMAGE.items() if named == what]
    out = scratch / what
    if not out.exists():
        shutil.copytree(folder, out)
        (file,) = out.glob("*.safetensors")
        quantized = {
            name.rpartition(".")[0] for name in load_file(file) if name.endswith((".weight_scale", ".deq_scale"))
        }
        changed = {f"{path}.{suffix}" for path in quantized}
        save_file({name: change(t) if name in changed else t for name, t in load_file(file).items()}, file)
    return out


def outputs(consumed: Consumed, version: str, whose: str, name: str) -> dict[str, torch.Tensor]:
    """What the engine computes, after checking what it said."""
    said, out = consumed(version, whose, name)
    kind = KINDS[name]
    derived = ["weight_offset"] if whose == "portable" and name == "W8A8_DYNAMIC" else list(kind.derived)
    assert "error" not in said, said
    assert said["checked"] == sorted(DECODES if whose == "decode" else kind.operators)
    for path, layer in said["layers"].items():
        wanted = {"scheme": kind.scheme, "missing": [], "derived": derived, "unexpected": []}
        assert layer == wanted, path
    return load_file(out)


@every_engine
@pytest.mark.parametrize("name", PRODUCED)
def test_files_of_msmodelslim(
    name: str, version: str, consumed: Consumed, x: dict[str, torch.Tensor], model: Model
) -> None:
    """An independent producer's files: nothing missing, nothing unexpected, and the layer is still the model's, as far
    as the type allows."""
    y = outputs(consumed, version, "theirs", name)
    dense = load_file(model(name) / "model.safetensors")
    limit = {"W4A4_MXFP4": 0.25, "W4A8_MXFP": 0.2, "W8A8_MXFP8": 0.06}.get(name, 0.03)
    for path, given in x.items():
        truth = given.float() @ dense[f"{path}.weight"].float().t() + dense.get(f"{path}.bias", torch.zeros(())).float()
        error = (y[path].float() - truth).norm() / truth.norm()
        assert error < limit or name == "W8A8", f"{path}: {error}"  # static scales belong to other inputs


def as_trained(name: str, model: torch.nn.Module, x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> None:
    """Outputs are those of fake quantization: at most 2^-8 apart in norm; and 2^-7 |y| + 2^-8 rms(y) each, where the
    values of weights are BF16 numbers. Those of integers are not: training rounds them to BF16, the engine does not."""
    exact = lookup(KINDS[name].pair[0]).exact_in_bf16
    for path, given in x.items():
        with torch.no_grad():
            truth = model.get_submodule(path)(given.float())
        apart, rms = (y[path].float() - truth).abs(), truth.square().mean().sqrt()
        each = bool((apart <= 2.0**-7 * truth.abs() + 2.0**-8 * rms).all())
        assert each or not exact, f"{path}: {float((apart / rms).max())}"
        assert apart.norm() <= 2.0**-8 * truth.norm(), f"{path}: {float(apart.norm() / truth.norm())}"


@every_engine
@pytest.mark.parametrize("name", KINDS)
def test_our_files(name: str, version: str, consumed: Consumed, x: dict[str, torch.Tensor], exported: Exported) -> None:
    as_trained(name, exported(name)[1], x, outputs(consumed, version, "ours", name))


@every_engine
def test_answers_of_a_mixed_type(
    version: str, consumed: Consumed, x: dict[str, torch.Tensor], exported: Exported
) -> None:
    """A node that receives keys and values from another: inputs are static, the bias is the folded one."""
    y = outputs(consumed, version, "decode", "W8A8_MIX")
    with answering("answer"):
        as_trained("W8A8_MIX", exported("W8A8_MIX")[1], x, y)
    with pytest.raises(AssertionError, match=r"model\.layers\.0"), answering("prompt"):
        as_trained("W8A8_MIX", exported("W8A8_MIX")[1], x, y)


@every_engine
@pytest.mark.parametrize("name", PORTABLE)
def test_portable_files(
    name: str, version: str, consumed: Consumed, x: dict[str, torch.Tensor], exported: Exported
) -> None:
    """Files for both sides, by the engine's real dispatch of compressed-tensors configurations: the same layers; an
    engine that has no scheme for them says so."""
    if version not in PORTABLE[name]:
        assert consumed(version, "portable", name)[0]["error"].startswith("NotImplementedError")
        return
    as_trained(name, exported(name, "compressed-tensors")[1], x, outputs(consumed, version, "portable", name))


@pytest.mark.parametrize("name", PORTABLE)
def test_loaders_for_nvidia_take_the_same_folder(name: str, exported: Exported, x: dict[str, torch.Tensor]) -> None:
    """The files of the test above in plain transformers, by compressed-tensors, where weights are the trained ones, and
    packed in our own engine, which computes with those, and with inputs rounded by the rule of engines for NVIDIA."""
    folder, _ = exported(name, "compressed-tensors")
    assert broken(folder) == set()
    packed, dense = load_packed(folder, torch.float32), load_exported(folder, "vllm")
    for path, given in x.items():
        with torch.no_grad():
            found, truth = (each.get_submodule(path)(given.float()) for each in (packed, dense))
        limit = 1e-4 if lookup(KINDS[name].pair[0]).exact_in_bf16 else 2.0**-8  # dense weights are rounded to BF16
        assert (found - truth).norm() <= limit * truth.norm(), path


@every_engine
def test_static_inputs_of_compressed_tensors_lack_an_offset(version: str, consumed: Consumed) -> None:
    """The engine's scheme makes `input_offset` without a value, reads it, and counts on a file to have it, which files
    of symmetric static inputs do not: what it then computes with is whatever memory held."""
    said, _ = consumed(version, "static", STATIC[0])
    for layer in said["layers"].values():
        assert layer["scheme"] == KINDS[STATIC[0]].scheme and layer["unexpected"] == []
        assert layer["missing"] == ["input_offset"]


@pytest.mark.parametrize(("what", "name"), DAMAGE)
def test_damage_is_noticed(
    what: str, name: str, consumed: Consumed, x: dict[str, torch.Tensor], exported: Exported
) -> None:
    y = outputs(consumed, ENGINES[1], what, name)
    with pytest.raises(AssertionError, match=r"model\.layers\.0"):
        as_trained(name, exported(name)[1], x, y)
