"""vllm-ascend's own code on the experts of checkpoints: run by test_experts.py, in a process of its own, as

    consume_experts.py SOURCE DEVICE VLLM RULES JOBS

which are those of `consume.py`; JOBS is a JSON list of [folder, path, inputs, outputs]: a checkpoint, where its experts
are, a safetensors file with tokens `x`, the experts that are chosen for each (`chosen`) and their `shares`, and where
`y` goes. The engine's config chooses a scheme, which makes parameters; stored tensors are copied into them as vLLM's
loader of fused experts does (`w1` above `w3`, `w2`); `process_weights_after_loading` and `apply` run, down to the
product's operators. Sending tokens to experts and back, which engines do between devices, is a stand-in.
"""

import enum
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.ascend import expert_operators, operators
from tests.ascend.consume import config_of, engine, module, tell
from tests.ascend.vllm_parts import CURRENT, PARTS, set_weight_attrs

_FUSED = "vllm.model_executor.layers.fused_moe"
MODELS = {"_310P": torch.float16}
SHARDS = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}


class RoutedExperts(nn.Module):
    """Of vLLM: owns the parameters of a layer's experts, and loads them."""

    activation: Any = None
    swiglu_limit = 0.0
    global_redundant_expert_num = 0
    apply_router_weight_on_input = False
    ascend_expert_map = ascend_mc2_mask = ascend_pertoken_scale = None
    moe_config = SimpleNamespace(num_logical_experts=None)

    def weight_loader(
        self, param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, **named: Any
    ) -> None:
        """Gates go above what they gate; shapes must fit."""
        whole = param.data[expert_id]
        half = len(whole) // 2
        place = {"w1": whole[:half], "w3": whole[half:], "w2": whole}[shard_id]
        assert place.shape == loaded_weight.shape, f"{weight_name}: {loaded_weight.shape} into {place.shape}"
        assert place.is_floating_point() == loaded_weight.is_floating_point(), weight_name
        place.copy_(loaded_weight)


class FusedMoEMethodBase:
    """Of vLLM."""

    def __init__(self, moe_config: Any) -> None:
        self.moe = moe_config


Activation = enum.Enum(
    "Activation", {name: name.lower() for name in
    ("SILU", "SITU", "SWIGLUOAI", "SWIGLUOAI_UNINTERLEAVE", "SWIGLUSTEP", "GELU", "GELU_TANH")},
)  # fmt: skip


class Sent:
    """Tokens sorted by expert, and added up again."""

    def fused_experts(self, fused_experts_input: Any, quant_method: Any = None) -> Tensor:
        x, ids, shares = (getattr(fused_experts_input, name) for name in ("hidden_states", "topk_ids", "topk_weights"))
        assert shares.dtype == x.dtype
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS[0])
        sent = SimpleNamespace(
            hidden_states=x[order // ids.shape[1]], group_list=counts, group_list_type=1, dynamic_scale=None,
            topk_scales=None, combine_metadata=None,
        )  # fmt: skip
        y = self._products(fused_experts_input, sent, quant_method)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*ids.shape, -1).float() * shares[..., None].float()).sum(1).to(x.dtype)

    def _products(self, fused_experts_input: Any, sent: Any, quant_method: Any) -> Tensor:
        own: Any = module("_310p.fused_moe.moe_mlp" if DEVICE == ["_310P"] else "ops.fused_moe.moe_mlp")
        build: Any = module("ops.fused_moe.dataclass.moe_mlp", "ops.fused_moe.moe_runtime_args")
        given = build.build_mlp_compute_input(
            fused_experts_input=fused_experts_input, token_dispatch_output=sent, use_fusion_ops=True
        )
        if quant_method is None:
            made = own.unified_apply_mlp(mlp_compute_input=given)
            y: Tensor = made[0] if isinstance(made, tuple) else made
        else:
            y = own.apply_moe_mlp(given, quant_method)[0]
        return y


EXPERTS: list[int] = []  # how many the layer that runs has
DEVICE: list[str] = []
PARTS |= {
    _FUSED: {"FusedMoE": RoutedExperts, "RoutedExperts": RoutedExperts, "MoERunner": type("MoERunner", (), {}),
             "FusedMoEMethodBase": FusedMoEMethodBase, "FusedMoeWeightScaleSupported": enum.Enum("S", "CHANNEL GROUP")},
    f"{_FUSED}.layer": {"FusedMoE": RoutedExperts, "FusedMoEMethodBase": FusedMoEMethodBase},
    f"{_FUSED}.activation": {"MoEActivation": Activation},
    "vllm.forward_context": {"get_forward_context": lambda: SimpleNamespace(moe_comm_method=Sent())},
    "vllm.envs": {"VLLM_USE_V2_MODEL_RUNNER": False, "VLLM_BATCH_INVARIANT": False},
    "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
}  # fmt: skip


def started(*given: str) -> set[str]:
    """The engine, as `consume.engine` starts it, with what experts ask of a server."""
    operators.OPERATORS.update(expert_operators.OPERATORS)
    seen = engine(*given)
    DEVICE[:] = [given[1]]
    CURRENT.model_config.dtype = MODELS.get(given[1], torch.bfloat16)
    vars(torch.ops)["_C_ascend"] = expert_operators.OWN
    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]  # which torch_npu adds
    CURRENT.use_v2_model_runner = False
    CURRENT.parallel_config = SimpleNamespace(enable_expert_parallel=False, enable_eplb=False)
    CURRENT.compilation_config = SimpleNamespace(mode=0)
    CURRENT.model_config.enforce_eager = True
    config = module("ascend_config")._ASCEND_CONFIG
    config.eplb_config = SimpleNamespace(dynamic_eplb=False)
    config.enable_fused_mc2, config.multistream_overlap_gate = 0, False
    module("utils")._CUSTOM_OP_ENABLED = True
    module("distributed.parallel_state")._MC2 = SimpleNamespace()  # one device
    return seen


def width(tensors: dict[str, Tensor], path: str) -> int:
    """How many columns a matrix has; FP4 has two in a byte."""
    weight = tensors[f"{path}.weight" if f"{path}.weight" in tensors else f"{path}.weight_packed"]
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def load(config: Any, path: str, tensors: dict[str, Tensor]) -> tuple[Any, RoutedExperts, dict[str, Any]]:
    """The layer with its parameters, its method, and what was said."""
    layer = RoutedExperts()
    layer.activation = Activation.SILU  # type: ignore[attr-defined]  # made of a dict
    method = config.get_quant_method(layer, path)
    experts = 1 + max(int(name.removeprefix(f"{path}.").partition(".")[0]) for name in tensors)
    EXPERTS[:] = [experts]
    columns, inner = (width(tensors, f"{path}.0.{name}") for name in ("gate_proj", "down_proj"))
    method.create_weights(layer, experts, columns, inner, CURRENT.model_config.dtype, weight_loader=layer.weight_loader)
    own, given = dict(layer.named_parameters()), set()
    for parameter in own.values():
        if parameter.is_floating_point():
            parameter.data.fill_(float("nan"))
    for name, tensor in tensors.items():
        expert, shard, suffix = name.removeprefix(f"{path}.").split(".")
        stack, shard_id = SHARDS[shard]
        given.add(f"{stack}_{suffix}")
        if (parameter := own.get(f"{stack}_{suffix}")) is not None:
            loader = parameter.weight_loader  # type: ignore[attr-defined]  # vLLM puts it there
            loader(param=parameter, loaded_weight=tensor, weight_name=name, shard_id=shard_id, expert_id=int(expert))
    said = {"scheme": type(method.quant_method).__name__, "missing": sorted(own.keys() - given)}
    return method, layer, {**said, "unexpected": sorted(given - own.keys())}


def run(folder: str, path: str, inputs: str, out: str) -> dict[str, Any]:
    """One job."""
    config, given = config_of(Path(folder), *DEVICE), load_file(inputs)
    config.packed_modules_mapping = {"experts": [f"experts.0.{shard}" for shard in SHARDS]}
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= {name: tensor for name, tensor in load_file(file).items() if name.startswith(f"{path}.")}
    method, layer, said = load(config, path, tensors)
    method.process_weights_after_loading(layer)
    x, chosen, shares = given["x"], given["chosen"], given["shares"]
    if "topk_ids" in method.apply.__annotations__:
        y = method.apply(layer, x, shares, chosen)
    else:
        y = method.apply(
            layer, x, torch.zeros(len(x), EXPERTS[0]), chosen.shape[1], False, num_experts=EXPERTS[0],
            custom_routing_function=lambda **_: (shares, chosen), activation=Activation.SILU,
        )  # fmt: skip
    save_file({"y": y}, out)
    return said


def main(source: str, device: str, vllm: str, rules: str, jobs: str) -> None:
    seen = started(source, device, vllm, rules)
    tell(jobs, seen, lambda one: run(*one))


if __name__ == "__main__":
    main(*sys.argv[1:])
