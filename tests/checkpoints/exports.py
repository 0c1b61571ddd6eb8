"""Tiny quantized models and their exports, for the tests of exporting and of verifying."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.checkpoints.export import RECORD, export_model
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.support import pairs
from qat.checkpoints.verify import verify
from qat.init.calibration import calibrate
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply

TARGET = "compressed-tensors"
Pair = tuple[str, str | None]
UNIFORM: list[Pair] = [
    ("int4_g64", None),
    ("int4_g128", "int8_token"),
    ("int4_g128", "fp8_token"),
    ("int8_channel", "int8_token"),
    ("int8_channel", None),
    ("fp8_channel", "fp8_token"),
    ("fp8_tensor", "fp8_tensor"),
    ("fp8_b128", "fp8_g128"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", None),
    ("mxfp4", "mxfp4"),
    ("mxfp4", None),
    ("mxfp8", "mxfp8"),
    ("ternary_g64", None),
    ("int4_g32_asym", None),
    ("int8_channel_asym", None),
    ("int3_channel_asym", None),
]
AFFINE = [pair for pair in pairs(ROWS) if pair[0].endswith("_asym")]
SYMMETRIC = [pair for pair in pairs(ROWS) if pair not in AFFINE]

SKIP_HEAD = [{"match": "lm_head", "skip": "head"}]
SKIP_TABLE = [{"match": "*embed_tokens", "skip": "table"}]


def ids(tokens: int = 48) -> torch.Tensor:
    return (torch.arange(tokens) * 31 + 5).remainder(384)[None]


def quantized(source: Path, rules: list[dict[str, Any]], **options: Any) -> nn.Module:
    """The model in `source` under a scheme of `rules`, calibrated, and moved a little as training would."""
    model = load_model(source)
    scheme = Scheme(rules=rules, **{"learn": "none", "init": (), **options})
    apply(model, scheme)
    calibrate(model, [{"input_ids": ids()}], scheme)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.05 if "log_" in name else 0.02 * float(parameter.std()) if parameter.ndim > 1 else 0.01
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pair_rules(weight: str, input: str | None, match: str = "*_proj") -> dict[str, Any]:
    return {"match": match, "weight": weight, "input": input}


def projections(source: Path, pair: Pair, **options: Any) -> nn.Module:
    """The model with one pair of formats for all layers but embedding, head and routers."""
    return quantized(source, [pair_rules(*pair), {"match": "*", "skip": "not a projection"}], **options)


def export_pair(source: Path, out: Path, pair: Pair, target: str = TARGET, **options: Any) -> nn.Module:
    """Export `projections`; returns the model."""
    model = projections(source, pair, **options)
    quiet_export(model, source, out, target)
    return model


def quiet_export(model: nn.Module, source: Path, out: Path, target: str = TARGET, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return export_model(model, source, out, target, **options)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of an export that is one file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], forget: bool = False) -> None:
    """Change config.json; `forget` removes the record, as in another tool's folder."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    if forget:
        (folder / RECORD).unlink()


def broken(folder: Path, logits: bool = False) -> set[str]:
    """Names of the checks of `verify` that fail."""
    return {check.name for check in verify(folder, logits=logits).checks if not check.ok}


def forward_weights(model: nn.Module) -> dict[str, Tensor]:
    """BF16 weight of every quantized linear layer, as the forward pass multiplies with it."""
    with torch.no_grad():
        return {path: layer.value().to(torch.bfloat16) for path, layer in weights(model).items() if not layer.is_table}


def mixed_rules(chunk: list[Pair]) -> list[dict[str, Any]]:
    """One pair for each place that may differ: the attention inputs, the output projection, the two MLP halves."""
    places = ("*.{}.self_attn.[qkv]_proj", "*.{}.self_attn.o_proj", "*.{}.mlp.[gu]*_proj", "*.{}.mlp.down_proj")
    return [pair_rules(*pair, match=places[i % 4].format(i // 4)) for i, pair in enumerate(chunk)]
