"""The target `gguf`: one file for llama.cpp, Ollama and LM Studio. What stands here says which layers it holds; the
file itself is written by `file.py`, since it is no folder of safetensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qat.checkpoints.layouts.gguf.engines import METHOD as METHOD
from qat.checkpoints.layouts.gguf.engines import ROWS as ROWS
from qat.checkpoints.layouts.gguf.engines import TABLES as TABLES
from qat.checkpoints.layouts.gguf.families import find
from qat.checkpoints.layouts.gguf.types import row_bytes, type_of, unit
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.target import TargetLayer
from qat.checkpoints.shards import STEMS
from qat.errors import UnsupportedError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor

FILE = ".gguf"
DESCRIPTION = None
STEM = STEMS[0]
FUSES_TENSOR_SCALES = False  # it has none
ROTATED = None
STACKS_OF = ()
CACHES = None


def check(layer: TargetLayer) -> None:
    """Raise where llama.cpp does not know the model, or multiplies with other numbers than were trained."""
    family = find(layer.model_type)
    if layer.weight.global_scale and not family.mlp_scales and ".mlp." in layer.path:
        raise UnsupportedError(
            f"{layer.path}: llama.cpp's {layer.model_type} leaves out the scale above {layer.weight.name} in its MLP; "
            "use mxfp4 or q4_0 for it"
        )
    if layer.rounded and not layer.weight.exact_in_bf16:
        raise UnsupportedError(
            f"{layer.path}: {layer.weight.name} was trained rounded to BF16, but llama.cpp multiplies with the exact "
            "products of codes and scales; set scheme.round_bf16: false"
        )
    kind = type_of(layer.weight)
    if kind is not None and layer.shape[-1] % unit(kind):
        raise UnsupportedError(
            f"{layer.path}: {kind.name} has blocks of {unit(kind)} in llama.cpp, which do not divide a width of "
            f"{layer.shape[-1]}; use mxfp4 or q4_0 for it"
        )
    if layer.weight.global_scale and layer.is_table:
        raise UnsupportedError(
            f"{layer.path}: llama.cpp looks rows of a table up without the scale above {layer.weight.name}; use q8_0 "
            "for it"
        )


def pack(q: QTensor, input: Format | None = None, amax: Tensor | None = None) -> dict[str, Tensor]:
    """The rows of blocks of one matrix, uint8 (rows, bytes)."""
    return {"weight": row_bytes(q)}


def unpack(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Files are read by `read.py`, and served by llama.cpp."""
    raise UnsupportedError(f"{module.path}: layers of GGUF files are not served packed; llama.cpp does that")


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """A file has no config.json."""
    return {}


def files(config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """None."""
    return {}
