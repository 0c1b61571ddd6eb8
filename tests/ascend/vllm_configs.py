"""What vllm-ascend's configs of FP8 and of ModelOpt's MXFP8 inherit from vLLM: reading `quantization_config`, and which
layers it leaves dense; as vLLM documents it. Put in place by `consume.py`."""

from fnmatch import fnmatch
from typing import Any

from tests.ascend.vllm_parts import Config


def is_layer_skipped(
    prefix: str, ignored_layers: list[str], fused_mapping: Any = None, *, match_mode: str = "exact"
) -> bool:
    """Whether the list names the layer. Fused layers do not occur here: each is run by itself."""
    assert match_mode == "exact"
    return prefix in ignored_layers


class Fp8Config(Config):
    """`quant_method: fp8`."""

    ignored_layers_match_mode = "exact"

    def __init__(self, activation_scheme: str, ignored_layers: list[str], weight_block_size: list[int] | None) -> None:
        super().__init__()
        assert activation_scheme in ("static", "dynamic")
        assert weight_block_size is None or (len(weight_block_size) == 2 and activation_scheme == "dynamic")
        self.activation_scheme, self.ignored_layers = activation_scheme, ignored_layers
        self.weight_block_size = weight_block_size

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Fp8Config":
        ignored = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
        return cls(config["activation_scheme"], ignored, config.get("weight_block_size"))


class ModelOptMxFp8Config(Config):
    """`quant_method: modelopt` with `quant_algo: MXFP8`, in the flat form of config.json."""

    def __init__(self, exclude_modules: list[str]) -> None:
        super().__init__()
        self.exclude_modules = exclude_modules

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelOptMxFp8Config":
        assert "quantization" not in config and config["quant_algo"].upper() == "MXFP8", config
        return cls(config.get("ignore", []))

    def is_layer_excluded(self, prefix: str) -> bool:
        """By its name, a part of it, or a wildcard."""
        return any(
            is_layer_skipped(prefix, [one]) or one in prefix or fnmatch(prefix, one) for one in self.exclude_modules
        )


_QUANTIZATION = "vllm.model_executor.layers.quantization"
CONFIG_PARTS: dict[str, dict[str, Any]] = {
    f"{_QUANTIZATION}.fp8": {"Fp8Config": Fp8Config},
    f"{_QUANTIZATION}.modelopt": {"ModelOptMxFp8Config": ModelOptMxFp8Config},
    f"{_QUANTIZATION}.utils.quant_utils": {"is_layer_skipped": is_layer_skipped},
}
