"""Models whose tensors are divided among processes by FSDP2: torch does the work, and only this file knows of it.

`divide` gives every process a share of each tensor, one group of tensors per decoder block and one for what no block
owns. A block's tensors are whole while it runs; those of the last group (embeddings, final norm, head) while something
runs inside `run` or `read`, since losses use the head outside of any module's forward pass. Everything here is an
ordinary call on a model that was not divided, so its callers do not ask. torch's modules for it are imported by
`divide` alone: they take a while.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qat import zero
from qat.errors import UnsupportedError
from qat.quantizer import WeightQuantizer
from qat.sites import Site

T = TypeVar("T")
SCALES = ("start", "zero_point", "choice")  # buffers of a weight's quantizer that grow with the weight


# --- models -----------------------------------------------------------------------------------------------------------


def divide(model: nn.Module, device: torch.device, size: int, fill: Callable[[nn.Module], None] | None = None) -> None:
    """Divide the tensors of `model`, which is the same in every process, among `size` processes with such a device.

    Scales of weights are divided with them. Tensors keep their names.

    Args:
        fill: gives every block, and at last the model, its tensors before they are divided, so that no more than one
            block is ever whole; without it they are there.

    Raises:
        UnsupportedError: see `refusal`.
    """
    if is_divided(model):
        return
    if reason := refusal(model):
        raise UnsupportedError(reason)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (size,))
    for part in (*blocks(model), model):
        if fill is not None:
            fill(part)
        for module in part.modules():
            if isinstance(module, WeightQuantizer):
                _as_parameters(module)
        for parameter in part.parameters():
            if not is_share(parameter):
                parameter.data = parameter.data.contiguous()
        fully_shard(part, mesh=mesh)
    caller: Any = model
    caller.run_whole = _called
    register_fsdp_forward_method(model, "run_whole")
    read(model, lambda: None)  # FSDP2 takes what runs first for the root


def _called(work: Callable[[], T]) -> T:
    return work()


def _as_parameters(quantizer: WeightQuantizer) -> None:
    """Its scales as parameters that are not trained: FSDP2 divides no buffers."""
    for name in SCALES:
        buffer = quantizer._buffers.get(name)
        if buffer is not None:
            del quantizer._buffers[name]
            quantizer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists: decoder blocks, and those of towers."""
    found: list[nn.Module] = []
    for child in model.children():
        found += child.children() if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def refusal(model: nn.Module, strategy: str = "fsdp") -> str | None:
    """Why `model` cannot be divided by a strategy, or None."""
    of: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, WeightQuantizer) and module.format.super_block:
            return (
                f"{name}: nothing divides the numbers above the scales of {module.format.name} yet, as strategy "
                f"{strategy} asks; use ddp"
            )
    for block in blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, nn.ModuleList) and name.endswith("experts"):
                return (
                    f"{type(model).__name__} has each expert as a module of its own, of which a batch reaches some; "
                    f"strategy {strategy} needs every process to reach all, so take strategy=ddp"
                )
        for name, parameter in block.named_parameters():
            if of.setdefault(id(parameter), block) is not block:
                return (
                    f"two blocks of {type(model).__name__} share {name}, which strategy {strategy} cannot divide; "
                    "use ddp"
                )
    return None


def is_divided(model: nn.Module | None) -> bool:
    """Whether `divide` was called with this model, or DeepSpeed has it."""
    if zero.of(model) is not None:
        return True
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(model, module.FSDPModule)


def run(model: Any, work: Callable[[], T]) -> T:
    """What `work` gives, in which tensors of `model` that no block owns are whole, and stay so until the backward pass
    has used them. Every process must do the same number of forward passes inside."""
    division = zero.of(model)
    if division is None and not is_divided(model):
        return work()
    result: T = model.run_whole(work) if division is None else division.run(work)
    return result


def close(model: Any) -> None:
    """Leave this process only its share of what `run` made whole, where no backward pass follows."""
    if (division := zero.of(model)) is not None:
        division.close()
    elif is_divided(model):
        model.reshard()


def read(model: Any, work: Callable[[], T]) -> T:
    """`run` without gradients where the model is divided."""
    if not is_divided(model):
        return work()
    try:
        with torch.no_grad():
            return run(model, work)
    finally:
        close(model)


# --- tensors ----------------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; every process must ask."""
    if zero.is_share(tensor):
        return zero.whole(tensor)
    values: Any = tensor.detach()
    found: Tensor = values.full_tensor() if _is_dtensor(tensor) else values
    return found


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is divided."""
    return zero.is_share(tensor) or _is_dtensor(tensor)


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def share(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, to be read and written."""
    if zero.is_share(tensor):
        return zero.share(tensor)
    values: Any = tensor.detach()
    own: Tensor = values.to_local() if _is_dtensor(tensor) else tensor.data
    return own


def copy(parameter: Tensor) -> Tensor:
    """A copy, divided as the parameter is."""
    return zero.twin(parameter) if zero.is_share(parameter) else parameter.detach().clone()


def moment(optimizer: Any, parameter: nn.Parameter, key: str) -> Tensor | None:
    """A state of the optimizer for a parameter, whole; None before the first step. Every process must ask."""
    if zero.is_trained(parameter):
        return zero.moment(parameter, key)
    found: Tensor | None = optimizer.state.get(parameter, {}).get(key)
    return None if found is None else whole(found)


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Write `values`, the whole ones, into a tensor that may be divided."""
    if zero.is_share(target):
        zero.put(target, values)
        return
    if _is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        divided: Any = target
        values = values.to(target.device)
        values = distribute_tensor(values, divided.device_mesh, divided.placements, src_data_rank=None)
    target.copy_(values)
    zero.remember(target)


@contextlib.contextmanager
def swapped(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Tensors hold other values (of this process's share) inside this context."""
    kept: list[tuple[Tensor, Tensor]] = []
    divided: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor, value in values:
            if is_share(tensor):
                own = share(tensor)
                divided.append((own, own.clone()))
                own.copy_(value)
            else:
                kept.append((tensor, tensor.data))
                tensor.data = value
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for own, value in divided:
            own.copy_(value)


@contextlib.contextmanager
def edited(module: nn.Module | None, write: bool = True) -> Iterator[None]:
    """A block's (or the model's own) tensors are whole inside this context, and what is written there counts."""
    if not is_divided(module):
        yield
        return
    if module is not None and zero.of(module) is not None:
        with zero.gathered(module, write):
            yield
        return
    holder: Any = module
    holder.reshard()  # what runs first stays whole after its pass
    divided = dict(holder.named_parameters())
    holder.unshard()
    try:
        yield
        for name, parameter in holder.named_parameters() if write else ():
            if not is_share(parameter):
                put(divided[name], parameter.detach())
    finally:
        holder.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All of `model` is whole inside this context, to be read without running it."""
    if zero.of(model) is not None:
        with edited(model, write=False):
            yield
        return
    with contextlib.ExitStack() as open_modules:
        for module in model.modules():
            open_modules.enter_context(edited(module, write=False))
        yield


def holders(model: nn.Module) -> dict[int, nn.Module]:
    """By the identity of a module of a divided model, the one for `edited` that makes its tensors whole."""
    outer = [module for module in model.modules() if is_divided(module)]
    return {id(below): holder for holder in outer for below in holder.modules()}


def opened(model: nn.Module, sites: Sequence[Site]) -> Iterator[Site]:
    """Each site while its tensors are whole, to be read; not in order where the model is divided. Go through all."""
    for holder, members in by_holder(model, sites):
        with edited(holder, write=False):
            yield from members


def by_holder(model: nn.Module, sites: Sequence[Site]) -> list[tuple[nn.Module | None, list[Site]]]:
    """Sites by the module for `edited` that makes them whole; one group where the model is not divided."""
    if not is_divided(model):
        return [(None, list(sites))]
    inner = holders(model)
    groups: dict[int, tuple[nn.Module | None, list[Site]]] = {}
    for site in sites:
        holder = inner[id(site.owner)]
        groups.setdefault(id(holder), (holder, []))[1].append(site)
    return list(groups.values())
