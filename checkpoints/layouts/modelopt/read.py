"""The independent reader of modelopt checkpoints (hf_quant_config.json and config.json's `quantization_config`).

Scales multiply here where compressed-tensors divides: weight = code * weight_scale * weight_scale_2, and `input_scale`
is the reciprocal of compressed-tensors' `input_global_scale`. Written from modelopt 0.47's export and vLLM's loader.
"""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qat.checkpoints.hf import read_json
from qat.checkpoints.layouts.bits import Array, float_values, scale_values
from qat.checkpoints.layouts.caches import refuse_unread, says_nothing
from qat.checkpoints.layouts.modelopt.engines import NO_PLAIN
from qat.checkpoints.layouts.reader import UNREAD_KEYS, ExportedFolder, PackedModule, PlainLoading, Spec
from qat.checkpoints.names import StoredNames
from qat.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEGACY = "hf_quant_config.json"
Args = dict[str, Any]


def _floats(bits: int, strategy: str, dynamic: bool | str, group: int = 0, scale: str = "") -> Args:
    args: Args = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
    return args | ({"group_size": group, "scale_dtype": scale} if group else {})


_FP4 = (4, "tensor_group")
_E4M3, _E8M0 = (16, "torch.float8_e4m3fn"), (32, "torch.uint8")
# quant_algo -> format, weights, inputs
_CACHE_ALGORITHM, _CACHE_SCHEME = "FP8", {"dynamic": False, "num_bits": 8, "type": "float"}
_ALGORITHMS: dict[str, tuple[str, Args, Args | None]] = {
    "NVFP4": ("nvfp4-pack-quantized", _floats(*_FP4, False, *_E4M3), _floats(*_FP4, "local", *_E4M3)),
    "W4A16_NVFP4": ("nvfp4-pack-quantized", _floats(*_FP4, False, *_E4M3), None),
    "FP8": ("float-quantized", _floats(8, "tensor", False), _floats(8, "tensor", False)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("float-quantized", _floats(8, "channel", False), _floats(8, "token", True)),
    "MXFP8": ("mxfp8-quantized", _floats(8, "group", False, *_E8M0), _floats(8, "group", True, *_E8M0)),
}


class Reader(ExportedFolder):
    """A modelopt checkpoint on disk in which every quantized layer has the same algorithm."""

    METHOD = "modelopt"
    CACHE_SCALES = ("k_proj.k_scale", "v_proj.v_scale")
    SCALES = ("weight_scale", "weight_scale_2", "input_scale")
    SUFFIXES = ("weight", *SCALES)

    def _check_configuration(self) -> None:
        algorithm = self.quantization.get("quant_algo")
        if algorithm not in _ALGORITHMS:
            raise UnsupportedError(f"{self.where}: quant_algo {algorithm!r}; readable: {', '.join(_ALGORITHMS)}")
        self._form, self._weights, self._input = _ALGORITHMS[algorithm]
        group = self.quantization.get("group_size")
        if group is not None and group != self._weights.get("group_size"):
            raise UnsupportedError(f"{self.where}: {algorithm} with group_size {group}")
        if (self.folder / LEGACY).is_file():
            self._compare(read_json(self.folder / LEGACY).get("quantization") or {})

    def _cache_args(self) -> Args | None:
        scheme, algorithm = (self.quantization.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo"))
        if says_nothing(scheme) and algorithm is None:
            return None
        if algorithm not in (None, _CACHE_ALGORITHM) or (scheme or _CACHE_SCHEME) != _CACHE_SCHEME:
            raise UnsupportedError(
                f"{self.where}: caches quantized as {algorithm or scheme}; readable: {_CACHE_ALGORITHM}"
            )
        return _floats(8, "tensor", False)

    def _compare(self, legacy: dict[str, Any]) -> None:
        """Engines read either file, so both must say the same."""
        refuse_unread(legacy, str(self.folder / LEGACY), UNREAD_KEYS)
        pairs = {"quant_algo": "quant_algo", "exclude_modules": "ignore"}
        for key, flat in pairs.items():
            if legacy.get(key) != self.quantization.get(flat):
                raise CheckpointError(f"{self.folder / LEGACY}: {key} differs from config.json; engines read either")
        if legacy.get("kv_cache_quant_algo") != (None if self._cache_args() is None else _CACHE_ALGORITHM):
            raise CheckpointError(f"{self.folder / LEGACY}: kv_cache_quant_algo differs from config.json")

    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """The algorithm, for every linear layer that is not ignored."""
        return [self.quantization["quant_algo"]] if linear and not self.ignored(path) else []

    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether a wildcard of `ignore` matches `path`."""
        return any(fnmatchcase(path, pattern) for pattern in self.quantization.get("ignore") or [])

    def _module(self, path: str, group: str) -> PackedModule:
        return PackedModule(path, self._form, self._weights, self._input)

    def expected_tensors(self, module: PackedModule, *shape: int) -> dict[str, Spec]:
        """Type and shape of every tensor that a layer (rows, columns) must have, by its name below its path."""
        rows, columns = shape
        args = module.weights
        group = args.get("group_size", 0)
        specs: dict[str, Spec] = {
            "weight": ("U8", (rows, columns // 2)) if module.packed else ("F8_E4M3", (rows, columns)),
            "weight_scale": {
                "tensor_group": ("F8_E4M3", (rows, columns // max(group, 1))),
                "group": ("U8", (rows, columns // max(group, 1))),
                "channel": ("F32", (rows,)),
                "tensor": ("F32", ()),
            }[args["strategy"]],
        }
        if args["strategy"] == "tensor_group":
            specs["weight_scale_2"] = ("F32", ())
        if module.static_input:
            specs["input_scale"] = ("F32", ())
        return specs

    def _scale(self, module: PackedModule, tensors: dict[str, Tensor]) -> Array:
        scale = scale_values(tensors["weight_scale"])
        if module.weights["strategy"] == "tensor_group":
            scale = scale * float_values(tensors["weight_scale_2"])
        return scale.reshape(-1, 1) if scale.ndim < 2 else scale

    def plain_loading(self, model: "PreTrainedModel", names: StoredNames) -> PlainLoading:
        """Not at all."""
        return PlainLoading(NO_PLAIN)

    def static_input(self, path: str) -> Tensor | None:
        """The calibrated scale (or, above E4M3 block scales, the divisor) of a layer's input, float32 [1], or None."""
        name = self.modules[path].static_input
        if name is None:
            return None
        scale = self._sound_value(f"{path}.input_scale")
        return scale.reciprocal() if name == "input_global_scale" else scale
