"""msmodelslim, an independent producer, makes of the same model what our export makes: the same tensors, types, shapes
and description. Codes are equal where rules are; where not, it is said why."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat.checkpoints.layouts import open_export
from qat.checkpoints.layouts.ascend.write import fold_bias
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from tests.ascend.conftest import Exported, Model, Produced
from tests.ascend.exchanged import KINDS

pytestmark = pytest.mark.ascend
PRODUCED = [name for name, kind in KINDS.items() if kind.produced]
DESCRIPTION = "quant_model_description.json"
UP = "model.layers.0.mlp.up_proj"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("name", PRODUCED)
def test_the_same_tensors_and_description(name: str, produced: Produced, exported: Exported) -> None:
    theirs, ours = stored(produced(name)), stored(exported(name)[0])
    for key in [key for key in theirs if key.endswith(".bias")]:
        theirs[key] = theirs[key].bfloat16()  # as we store it; it widens it
    assert {key: (t.dtype, t.shape) for key, t in ours.items()} == {
        key: (t.dtype, t.shape) for key, t in theirs.items()
    }
    described = json.loads((produced(name) / DESCRIPTION).read_text())
    assert described.pop("metadata") == described.pop("optional") == {}, (
        "rotations and the like, of which there are none"
    )
    assert json.loads((exported(name)[0] / DESCRIPTION).read_text()) == described
    for folder in (produced(name), exported(name)[0]):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["W8A8_DYNAMIC", "W8A16"])
def test_int8_codes(name: str, produced: Produced, model: Model) -> None:
    """Scales are equal. msmodelslim divides in BF16, we in float32, as engines do: a tenth of the codes are neighbours,
    some of them -128, which we do not use; its arithmetic gives its codes exactly."""
    theirs, dense = stored(produced(name)), load_file(model(name) / "model.safetensors")[f"{UP}.weight"]
    ours = quantize(dense, lookup("int8_channel"))
    scale = theirs[f"{UP}.weight_scale"]
    assert torch.equal(ours.scales.stored.float(), scale)
    codes, found = theirs[f"{UP}.weight"].int(), ours.codes.view(torch.int8).int()
    apart = (codes - found).abs()
    assert apart.max() == 1 and (apart == 0).float().mean() > 0.85
    assert torch.equal((dense / scale.to(torch.bfloat16)).round().clamp(-128, 127).int(), codes)


def test_a_folded_bias(produced: Produced) -> None:
    """By its formula, from its own scales and codes, `quant_bias` is what we would write, but for a rounding: it
    divides in the model's BF16, so that a whole number has 8 bits, where we have all of them."""
    theirs = stored(produced("W8A8"))
    q = UP.replace("mlp.up_proj", "self_attn.q_proj")
    codes, deq, bias = theirs[f"{q}.weight"].long(), theirs[f"{q}.deq_scale"], theirs[f"{q}.bias"]
    start = -theirs[f"{q}.input_offset"].long() * codes.sum(dim=1)
    own = theirs[f"{q}.quant_bias"]
    assert torch.equal((bias.bfloat16() / deq.bfloat16() - -start.float()).round().int(), own)
    ours = fold_bias({"quant_bias": start.int(), "deq_scale": deq}, bias)["quant_bias"]
    part = (ours - start).abs()
    assert part.max() > 100 and ((ours - own).abs() <= 2**-7 * part + 1).all()


@pytest.mark.parametrize("name", ["W8A8_MXFP8", "W4A4_MXFP4", "W4A8_MXFP"])
def test_mx_scales(name: str, produced: Produced, model: Model) -> None:
    """Its rules for scales are others than ours (`even` of MXFP4, `ceil` of MXFP8): by the formulas read in its source,
    all but the few blocks whose logarithm it rounds up in BF16 have its scale. Any pair of code and scale loads."""
    theirs, dense = stored(produced(name)), load_file(model(name) / "model.safetensors")[f"{UP}.weight"].double()
    amax = dense.unflatten(-1, (-1, 32)).abs().amax(-1)
    exponent = torch.floor(torch.log2(amax)) - 8 if name == "W8A8_MXFP8" else torch.floor(torch.log2(amax * 8 / 7)) - 2
    assert ((exponent + 127) == theirs[f"{UP}.weight_scale"]).double().mean() > 0.97
    ours = quantize(dense.float(), lookup("mxfp8" if name == "W8A8_MXFP8" else "mxfp4")).scales.stored.view(torch.uint8)
    assert ((ours.int() - theirs[f"{UP}.weight_scale"].int()).abs() <= 1).all()
    assert not torch.equal(ours, theirs[f"{UP}.weight_scale"])


@pytest.mark.parametrize("name", PRODUCED)
def test_our_reader_reads_its_files(name: str, produced: Produced, model: Model) -> None:
    folder, dense = open_export(produced(name)), load_file(model(name) / "model.safetensors")
    limit = 0.16 if "MXFP4" in name or name == "W4A8_MXFP" else 0.04 if "MXFP8" in name else 0.01
    assert len(folder.modules) == 7
    for path in folder.modules:
        truth = dense[f"{path}.weight"].float()
        assert (folder.dense(path).float() - truth).norm() < limit * truth.norm(), path
