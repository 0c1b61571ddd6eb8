"""vllm-ascend's own code on checkpoints: run by test_consumer.py, in a process of its own, as

    consume.py SOURCE DEVICE VLLM RULES JOBS

SOURCE holds the package `vllm_ascend`, unpacked; DEVICE is A2, A3, _310P or A5; RULES is torch_npu's shape rules
(`metas.py`); JOBS is a JSON list of [folder, inputs, outputs]: a checkpoint, a safetensors file with an input for each
layer to run, by its path, and where outputs go; and "decode" for a node that receives keys and values from another.
The engine's config class reads the description and chooses a scheme, which makes parameters; stored tensors are copied
into them as vLLM's default loader does (same shape); then its `process_weights_after_loading` and `apply` run. One JSON
list goes to stdout: per job, per layer the scheme, and what was missing, derived or unexpected; and the operators that
were checked; or the error that the engine raised.
"""

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.ascend import metas
from tests.ascend.operators import OPERATORS
from tests.ascend.stubs import Standin, install
from tests.ascend.vllm_configs import CONFIG_PARTS
from tests.ascend.vllm_parts import CURRENT, PARTS, LinearBase

DESCRIPTION = "quant_model_description.json"
CONFIGS = {
    "compressed-tensors": (
        ("quantization.configs.compressed_tensors_config", "quantization.compressed_tensors_config"),
        "AscendCompressedTensorsConfig",
    ),
    "fp8": (("quantization.configs.fp8_config", "quantization.fp8_config"), "AscendFp8Config"),
    "modelopt": (("quantization.configs.modelopt_mxfp8_config",), "AscendModelOptMxFp8Config"),
}


def engine(source: str, device: str, vllm: str, rules: str) -> set[str]:
    """Make the engine's code importable; returns what will hold the names of operators that were checked."""
    seen: set[str] = set()
    npu = install({}, device, vllm)
    vars(npu).update({"int4": 285, "float4_e1m2fn_x2": 297, "hifloat8": 290}, **OPERATORS)
    vars(npu).update(metas.checked(OPERATORS, metas.load(Path(rules)), seen))
    for name, parts in {**PARTS, **CONFIG_PARTS}.items():
        vars(importlib.import_module(name)).update(parts)
    sys.path.append(source)
    started = module("ascend_config")  # what a server's start sets: weights in FRACTAL_NZ, as by default
    started._ASCEND_CONFIG = SimpleNamespace(weight_nz_mode=1)
    started._is_ascend_config_initialized = lambda config: True
    module("utils")._WEIGHT_PREFETCH_METHOD = Standin()  # which fetches weights ahead of time
    return seen


def module(*names: str) -> Any:
    """The first of these modules that the version has."""
    for name in names:
        try:
            return importlib.import_module(f"vllm_ascend.{name}")
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name.removeprefix("vllm_ascend.")):
                raise
    raise NotImplementedError(f"vllm-ascend has none of {names}")


def config_of(folder: Path, device: str = "A2") -> Any:
    """The engine's own config object, for a folder of any kind; a 310P has one of its own."""
    hf = json.loads((folder / "config.json").read_text())
    if (folder / DESCRIPTION).is_file():
        modelslim = module("quantization.configs.modelslim_config", "quantization.modelslim_config")
        kind = modelslim.AscendModelSlimConfig
        if device == "_310P":
            kind = module("_310p.quantization.modelslim_config").AscendModelSlimConfig310
            module("_310p.quantization.methods")  # which registers them
        config = kind(json.loads((folder / DESCRIPTION).read_text()))
        config.quant_prefix_mapper = lambda model_type, prefix: prefix
        config._update_packed_modules_mapping = lambda model_type: None
    else:
        names, own = CONFIGS[hf["quantization_config"]["quant_method"]]
        config = getattr(module(*names), own).from_config(hf["quantization_config"])
    CURRENT.quant_config = config
    CURRENT.model_config.hf_config = CURRENT.model_config.hf_text_config = SimpleNamespace(model_type=hf["model_type"])
    return config


def run(config: Any, path: str, stored: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[Any, torch.Tensor]:
    layer = LinearBase()
    layer.params_dtype, layer.prefix = x.dtype, path  # type: ignore[assignment]  # not parameters
    method = config.get_quant_method(layer, path)
    rows, columns = stored["shape"].tolist()
    method.create_weights(layer, columns, [rows], columns, rows, x.dtype, weight_loader=None)
    own = dict(layer.named_parameters())
    given = {name: tensor for name, tensor in stored.items() if name not in ("shape", "bias")}
    for name, parameter in own.items():
        if name in given:
            assert parameter.shape == given[name].shape, f"{path}.{name}: {given[name].shape} into {parameter.shape}"
            assert parameter.is_floating_point() == given[name].is_floating_point() or name == "input_offset", name
            parameter.data.copy_(given[name])
        elif parameter.is_floating_point():
            parameter.data.fill_(float("nan"))  # whatever reads it shows
    said = {
        "scheme": type(method.quant_method).__name__,
        "missing": sorted(own.keys() - given.keys() - method.get_computed_params()),
        "derived": sorted((own.keys() - given.keys()) & method.get_computed_params()),
        "unexpected": sorted(given.keys() - own.keys()),
    }
    method.process_weights_after_loading(layer)
    return said, method.apply(layer, x, stored.get("bias"))


def job(device: str, folder: str, inputs: str, out: str, node: str = "") -> dict[str, Any]:
    CURRENT.kv_transfer_config = SimpleNamespace(is_kv_consumer=True, is_kv_producer=False) if node else None
    config = config_of(Path(folder), device)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    answer, outputs = {}, {}
    for path, x in load_file(inputs).items():
        own = {name.removeprefix(f"{path}."): t for name, t in tensors.items() if name.startswith(f"{path}.")}
        own.pop("weight_shape", None)
        weight = own.get("weight", own.get("weight_packed"))
        assert weight is not None
        own["shape"] = torch.tensor([weight.shape[0], x.shape[-1]])
        answer[path], outputs[path] = run(config, path, own, x)
    save_file(outputs, out)
    return answer


def tell(jobs: str, seen: set[str], work: Callable[[list[str]], dict[str, Any]]) -> None:
    """Print what each of the jobs in a file gives, or why it failed, and which operators were `seen` to be checked."""
    answers: list[dict[str, Any]] = []
    for one in json.loads(Path(jobs).read_text()):
        seen.clear()
        try:
            answers.append(work(one) | {"checked": sorted(seen)})
        except Exception as error:
            traceback.print_exc()
            answers.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(answers))


def main(source: str, device: str, vllm: str, rules: str, jobs: str) -> None:
    seen = engine(source, device, vllm, rules)
    tell(jobs, seen, lambda one: {"layers": job(device, *one)})


if __name__ == "__main__":
    main(*sys.argv[1:])
