"""Models whose optimizer, gradients and (stage 3) parameters are divided by DeepSpeed's ZeRO, while its engine lives.

The counterpart of FSDP2 in `qat.sharded`, which asks here; besides, only the run's strategy, which makes and ends a
`Division`, and saved states do. In stages 1 and 2 parameters stay whole in every process, beside float32 masters that
are divided. In stage 3 a decoder block is fetched as a unit (a leaf module: scales come with their weights), and what
no block owns while the root runs. Nothing is imported: what DeepSpeed offers hangs on its engine and parameters.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

_NAME = "zero_division"  # of the attribute by which a module knows that it is divided


class Division:
    """A model in the hands of an engine.

    Args:
        root: the module that the engine calls, around the model; called with a function, it runs it.
        model: what is trained.
        blocks: its parts that are fetched as one.
        stage: of ZeRO, 1 to 3.
    """

    def __init__(self, root: nn.Module, model: nn.Module, blocks: list[nn.Module], stage: int) -> None:
        self.root, self.model, self.blocks, self.stage = root, model, blocks, stage
        self.engine: Any = None
        self.inside = False  # a forward pass of the root, where what no block owns is whole
        self._before: list[tuple[Any, set[str]]] = [(one, set(vars(one))) for one in self._everything()]
        self._own_hooks = [(hooks, set(hooks)) for hooks in self._hooks_outside_blocks()]
        self._hooks: list[Any] = []
        for block in blocks if stage == 3 else ():
            # Sets what deepspeed.utils.set_z3_leaf_modules sets for all modules of a class.
            setattr(block, "_z3_leaf", True)  # noqa: B010 # mypy takes attributes of modules for tensors
            self._hooks.append(block.register_forward_pre_hook(_differentiable))

    def _hooks_outside_blocks(self) -> Iterator[dict[int, Any]]:
        """Of the modules whose parameters no block owns."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
                yield from (module._forward_hooks, module._forward_pre_hooks)

    def _everything(self) -> list[Any]:
        return [*self.root.modules(), *self.root.parameters()]

    def begin(self, engine: Any, register: Callable[[nn.Module, nn.Parameter], Any]) -> None:
        """The engine has taken the model over; `register` has a module fetch a parameter that it does not own."""
        self.engine = engine
        for one in (self.model, *self.model.parameters()):
            setattr(one, _NAME, self)
        if self.stage < 3:
            return
        owned = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in owned:
                register(self.root, parameter)
        for hooks, before in self._own_hooks:  # the root fetches for them, and a head with hooks is no plain product
            for key in set(hooks) - before:
                del hooks[key]
        for block in self.blocks:
            setattr(block, _NAME, self)
        self._hooks.append(self.root.register_forward_pre_hook(lambda *_: self._enter(True)))
        self._hooks.append(self.root.register_forward_hook(lambda *_: self._enter(False), always_call=True))

    def _enter(self, inside: bool) -> None:
        self.inside = inside

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, with the model's forward passes in it."""
        if self.stage < 3 or self.inside:
            return work()
        found: list[Any] = []
        self.root(lambda: found.append(work()))
        return found[0]

    def close(self) -> None:
        """Leave this process its share of everything."""
        if self.stage == 3 and not self.inside:
            self.engine.optimizer.parameter_offload.partition_all_parameters()

    @property
    def norm(self) -> Tensor:
        """Of all gradients of the last step, before they were clipped."""
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.engine.device)

    @torch.no_grad()
    def end(self) -> None:
        """Make the model whole in every process again, with nothing of DeepSpeed left on it."""
        self.close()
        values = {id(p): whole(p) for p in self.model.parameters()} if self.stage == 3 else {}
        self.engine.destroy()
        for one, before in self._before:
            for name in set(vars(one)) - before:
                delattr(one, name)
        for parameter in self.model.parameters():
            parameter.grad = None
            parameter.data = values[id(parameter)] if values else parameter.data.clone()
        for module in self.root.modules():
            module._parameters = dict(module._parameters)
        for hook in self._hooks:
            hook.remove()
        self.engine = None


def _differentiable(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let gradients reach a block's input, where embeddings are frozen: the engine takes a block whose input wants none
    for done before it is."""
    first = inputs[0] if inputs else None
    if not (torch.is_grad_enabled() and isinstance(first, Tensor) and first.is_floating_point()):
        return inputs
    return (first if first.requires_grad else first.detach().requires_grad_(), *inputs[1:])


def of(model: Any) -> Division | None:
    """The division that a model, or a block of it in stage 3, is in."""
    return getattr(model, _NAME, None)


# --- tensors ----------------------------------------------------------------------------------------------------------


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that stage 3 divided, or the `twin` of one."""
    return hasattr(tensor, "ds_tensor") or hasattr(tensor, "twin_of")


def shape(tensor: Any) -> torch.Size:
    """Of the whole tensor."""
    found: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return found


def is_trained(parameter: Any) -> bool:
    """Whether an engine's optimizer has it."""
    return of(parameter) is not None and bool(parameter.requires_grad)


def share(tensor: Any) -> Tensor:
    """This process's part of what is divided, flat, and padded on the last process."""
    own: Tensor = tensor.ds_tensor if hasattr(tensor, "ds_tensor") else tensor
    return own.data


def twin(parameter: Any) -> Tensor:
    """A copy of this process's part, which is itself divided: see `whole` and `put`."""
    copy: Any = share(parameter).clone()
    copy.twin_of = parameter
    found: Tensor = copy
    return found


def whole(tensor: Any) -> Tensor:
    """All of what is divided, in every process, and on the device that computes; every process must ask."""
    parameter: Any = getattr(tensor, "twin_of", tensor)
    own, size = share(tensor), distributed.get_world_size()
    if size > 1:
        own = own.to(_device(parameter)).contiguous()
        found = torch.empty(size * own.numel(), dtype=own.dtype, device=own.device)
        distributed.all_gather_into_tensor(found, own)
        own = found
    return own[: parameter.ds_numel].view(parameter.ds_shape).to(_device(parameter), copy=True)


def _device(parameter: Any) -> torch.device:
    """Where a parameter is when it is whole."""
    device: torch.device = parameter.device  # of the empty tensor in its place
    return device


def put(tensor: Any, values: Tensor) -> None:
    """Write `values`, the whole ones, into what is divided, and into the masters of a parameter that is trained."""
    _fill(share(tensor), values)
    remember(tensor)


def _fill(own: Tensor, values: Tensor) -> None:
    """Write this process's part of the whole `values`."""
    begin = distributed.get_rank() * own.numel()
    mine = values.reshape(-1)[begin : begin + own.numel()]
    own[: mine.numel()].copy_(mine)


def remember(parameter: Any) -> None:
    """Tell the optimizer's masters what was written into a parameter."""
    if hasattr(parameter, "ds_tensor"):
        if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
            parameter._z3_optimizer.set_local_hp_param(parameter.ds_tensor.data, parameter)
    elif getattr(parameter, "_hp_mapping", None) is not None:
        parameter._hp_mapping.update_hp()


@contextlib.contextmanager
def gathered(module: nn.Module, write: bool) -> Iterator[None]:
    """The parameters of a module are whole inside this context; what every process writes there counts, if `write`."""
    parameters: list[Any] = list(module.parameters())
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    if divided:
        divided[0].all_gather(param_list=divided)
    try:
        yield
    finally:
        if divided:
            divided[0].partition(param_list=divided, has_been_updated=write)
    for parameter in parameters if write else ():
        remember(parameter)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def moment(parameter: Any, key: str) -> Tensor | None:
    """A state of the optimizer, whole, or None before the first step; every process must ask."""
    division = of(parameter)
    if division is None or not _begun(division):
        return None
    found: Tensor
    if division.stage == 3:
        found = parameter._z3_optimizer.get_full_hp_param(parameter, key)
    else:
        found = parameter.get_full_hp_param(key)
    return found


def _flat(division: Division) -> list[Tensor]:
    """The masters, one flat tensor per group."""
    optimizer = division.engine.optimizer
    third = division.stage == 3
    found: list[Tensor] = optimizer.fp32_partitioned_groups_flat if third else optimizer.single_partition_of_fp32_groups
    return found


def _begun(division: Division) -> bool:
    """Whether AdamW has a state, which stages 1 and 2 are then told to look at."""
    state = division.engine.optimizer.optimizer.state
    begun = all("exp_avg" in state.get(flat, {}) for flat in _flat(division))
    if begun and division.stage < 3:
        division.engine.optimizer._hp_optimizer_states_linked = False
        division.engine.optimizer._lazy_init_hp_params_optimizer_state()
    return begun


def moments(division: Division, keep: bool) -> dict[str, Tensor]:
    """AdamW's state by `NAME/KIND`, whole and on the CPU; empty without `keep`, where this process only helps."""
    optimizer = division.engine.optimizer
    found: dict[str, Tensor] = {}
    if not _begun(division):
        return found
    step = optimizer.optimizer.state[_flat(division)[0]]["step"]
    for name, parameter in division.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            value = moment(parameter, key)
            if keep and value is not None:
                found[f"{name}/{key}"] = value.cpu().contiguous()
                found[f"{name}/step"] = step.detach().cpu().clone()
    return found


@torch.no_grad()
def restore_moments(division: Division, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer the state that `moments`, or one that was not divided, had."""
    step = next((value for key, value in tensors.items() if key.endswith("/step")), None)
    if step is None:
        return
    for flat in _flat(division):
        state = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        division.engine.optimizer.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **state}
    _begun(division)
    parameters: dict[str, Any] = dict(division.model.named_parameters())
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        if kind != "step" and division.stage < 3:
            parameter.set_full_hp_param(value.to(parameter.device), kind)
        elif kind != "step":
            own = torch.zeros_like(share(parameter))
            _fill(own, value)
            parameter._z3_optimizer.set_local_hp_param(own, parameter, kind)


def forget_group() -> None:
    """DeepSpeed remembers process groups, which a second run of this process may not inherit."""
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if comm is not None and groups is not None:
        comm.cdb = None
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups.mesh_device = None
