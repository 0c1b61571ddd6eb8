"""What of a model an orthogonal matrix can be folded into, and how: for the initialisation step `rotate`.

`values` (R2 of SpinQuant, arXiv 2405.16406): attention mixes values across tokens but not with each other, so one
matrix per key-value head can stand between the rows of `v_proj` and the columns of `o_proj`. `residual` (R1): one
matrix for the residual stream, in all that reads or writes it. A norm there must commute with it, so its gain goes
into the weights that read it, and becomes one. That needs a norm without a mean (RMSNorm), every norm to be read by
matrices, and a head that is not the embedding, since only the head has the last norm's gain.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.init.channels import Channels, Member, channels
from qat.init.permute import in_heads
from qat.init.smooth import is_norm, offset_of
from qat.modes import dense
from qat.numbers.hadamard import LARGEST, BlockHadamard
from qat.quantizer import Quantizer

Start = Literal["identity", "hadamard", "random"]
_COMMUTES = 0.02  # of a norm's output; one that subtracts the mean is far off
_WITHOUT = "leave `residual` out of its sites"


@dataclass(frozen=True)
class Rotation:
    """Channels that a matrix can stand between.

    Attributes:
        name: for people.
        members: the dimensions of parameters that go through them, `heads` x repeats x `width` each.
        width: of a matrix.
        heads: how many matrices there are.
    """

    name: str
    members: tuple[Member, ...]
    width: int
    heads: int = 1


@dataclass
class Folding:
    """All rotations of a model, and its parameters as they were, with which they can be folded again and again.

    Attributes:
        rotations: one matrix (heads, width, width) belongs to each.
        gains: of the norm before a parameter's read dimension, by the parameter's id.
        norms: weights that become a constant, since their gains have gone elsewhere.
    """

    rotations: list[Rotation]
    gains: dict[int, Tensor] = field(default_factory=dict)
    norms: list[tuple[Tensor, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters: dict[int, Tensor] = {}
        self.turns: dict[int, list[tuple[Member, int]]] = defaultdict(list)
        for number, rotation in enumerate(self.rotations):
            for member in rotation.members:
                self.parameters[id(member.parameter)] = member.parameter
                self.turns[id(member.parameter)].append((member, number))
        self.before = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        self.norms_before = [weight.detach().clone() for weight, _ in self.norms]

    def folded(self, key: int, matrices: list[Tensor]) -> Tensor:
        """One parameter with the matrices in it, in their dtype; differentiable with respect to them."""
        value, gain = self.before[key].to(matrices[0].dtype), self.gains.get(key)
        for member, number in self.turns[key]:
            if gain is not None and member.read:
                value = (value.movedim(member.dim, -1) * gain.to(value)).movedim(-1, member.dim)
            value = turned(value, member.dim, matrices[number])
        return value

    @torch.no_grad()
    def write(self, matrices: list[Tensor]) -> None:
        """Put the model where these matrices take it."""
        with torch.autocast(matrices[0].device.type, enabled=False):
            for key, parameter in self.parameters.items():
                parameter.copy_(self.folded(key, matrices))
        for weight, value in self.norms:
            weight.fill_(value)
        torch.clear_autocast_cache()  # it holds BF16 copies of the weights as they were, if the caller has autocast on

    @torch.no_grad()
    def restore(self) -> None:
        """Put the model where it was, bit for bit."""
        for key, parameter in self.parameters.items():
            parameter.copy_(self.before[key])
        for (weight, _), before in zip(self.norms, self.norms_before, strict=True):
            weight.copy_(before)
        torch.clear_autocast_cache()


def turned(x: Tensor, dim: int, matrices: Tensor) -> Tensor:
    """x whose dimension `dim`, heads x repeats x width, is multiplied with matrices (heads, width, width): x R."""
    heads, width, _ = matrices.shape
    split = x.movedim(dim, -1).unflatten(-1, (heads, -1, width)).movedim(-3, 0)
    product = (split.reshape(heads, -1, width) @ matrices).view(split.shape)
    return product.movedim(0, -3).flatten(-3).movedim(-1, dim)


def start_of(kind: Start, rotation: Rotation, seed: int) -> Tensor:
    """(heads, width, width) float64 orthogonal matrices to begin with, on the device of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(rotation.width, dtype=torch.float64)
    if kind == "identity":
        matrix = eye.expand(rotation.heads, -1, -1)
    elif kind == "random":
        matrix = _random(rotation.heads, rotation.width, generator)
    else:
        matrix = torch.stack([_hadamard(rotation.width, generator) for _ in range(rotation.heads)])
    return matrix.contiguous().to(rotation.members[0].parameter.device)


def _random(heads: int, width: int, generator: torch.Generator) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(torch.randn(heads, width, width, generator=generator, dtype=torch.float64)).Q
    return orthogonal


def _hadamard(width: int, generator: torch.Generator) -> Tensor:
    """Hadamard's matrix with random signs; where the width is no power of two, times a random one for what is left."""
    size = min(width & -width, LARGEST)
    matrix = torch.eye(size, dtype=torch.float64)
    if size > 1:
        matrix = BlockHadamard(size)(matrix, torch.float64)
    if size < width:
        matrix = torch.kron(_random(1, width // size, generator)[0].contiguous(), matrix.contiguous())
    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1
    return matrix * signs


def polished(matrix: Tensor) -> Tensor:
    """A matrix that is orthogonal up to float32, so in float64."""
    matrix = matrix.double()
    for _ in range(2):  # Newton-Schulz, which squares what is missing
        matrix = matrix @ (
            1.5 * torch.eye(matrix.shape[-1], device=matrix.device, dtype=torch.float64) - 0.5 * matrix.mT @ matrix
        )
    return matrix


# --- what there is --------------------------------------------------------------------------------


def value_rotations(model: nn.Module) -> list[Rotation]:
    """One for every attention module with a layer of values and one that reads them."""
    places = [in_heads(model, path) for path, _ in model.named_modules() if "." in path]
    found = [Rotation("values", place.members, place.width, place.heads) for place in places if place is not None]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no v_proj and o_proj with heads between them; leave `values` out of the "
            "sites of rotate"
        )
    return found


@torch.no_grad()
def residual_rotation(model: Any, probe: Tensor) -> tuple[Rotation, dict[int, Tensor], list[tuple[Tensor, float]]]:
    """The residual stream, gains by the id of the parameter that takes them, and norms with what they become.

    Raises:
        UnsupportedError: no matrix commutes with what stands in the stream.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight is embedding:
        raise UnsupportedError(
            "the embedding is the head, so the last norm's gain has nowhere to go; set `untie: true`"
        )
    with dense(model, inputs=True), torch.autocast(probe.device.type, enabled=False):
        sets = channels(model, probe)
        stream = next((s for s in sets if any(m.parameter is embedding and m.dim == 1 for m in s.members)), None)
        if stream is None or stream.why:
            raise UnsupportedError(
                f"the residual stream of {type(model).__name__} is fixed by "
                f"{stream.why if stream else 'its embedding'}; {_WITHOUT}"
            )
        names = {id(norm.weight): path for path, norm in model.named_modules() if is_norm(norm)}
        readers, idle = _readers(model, stream, probe)
    width = embedding.shape[1]
    _check_reached(stream, idle, width)
    gains: dict[int, Tensor] = {}
    norms: list[tuple[Tensor, float]] = []
    for path in (names[id(m.parameter)] for m in stream.members if id(m.parameter) in names):
        norm = model.get_submodule(path)
        _check_norm(path, norm, width, readers)
        offset = offset_of(norm, norm.weight)
        for parameter in readers[path]:
            gains[id(parameter)] = norm.weight.detach().double() + offset
        norms.append((norm.weight, 1.0 - offset))
    members = tuple(member for member in stream.members if id(member.parameter) not in names)
    return Rotation("residual stream", members, width), gains, norms


def _readers(
    model: nn.Module, stream: Channels, probe: Tensor
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Parameters that sum over the stream, by the path of the norm whose output their module is given (or a view of
    it); and the parameters of modules that were never called."""
    read = {id(member.parameter) for member in stream.members if member.read}
    made: dict[int, tuple[str, Tensor]] = {}  # by storage; the tensors stay alive, so that none is used twice
    found: dict[str, list[Tensor]] = {}
    own = {
        path: list(module.parameters(recurse=False))
        for path, module in model.named_modules()
        if not isinstance(module, Quantizer)
    }
    idle = {path: parameters for path, parameters in own.items() if parameters}

    def produced(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: made.__setitem__(output.untyped_storage().data_ptr(), (path, output))

    def called(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            idle.pop(path, None)
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            source = None if given is None else made.get(given.untyped_storage().data_ptr())
            if source is not None:
                found.setdefault(source[0], []).extend(p for p in own[path] if id(p) in read)

        return hook

    handles: list[Any] = []
    for path, module in model.named_modules():
        if idle.get(path):
            handles.append(module.register_forward_pre_hook(called(path), with_kwargs=True))
        if is_norm(module):
            handles.append(module.register_forward_hook(produced(path)))
    try:
        model(input_ids=probe)
    finally:
        for handle in handles:
            handle.remove()
    return found, idle


def _check_reached(stream: Channels, idle: Mapping[str, list[Tensor]], width: int) -> None:
    known = {id(member.parameter) for member in stream.members}
    missed = [path for path, own in idle.items() if any(width in p.shape and id(p) not in known for p in own)]
    if missed:
        raise UnsupportedError(
            f"text alone does not reach {missed[0]}, which may read or write the residual stream; {_WITHOUT}"
        )


def _check_norm(path: str, norm: nn.Module, width: int, readers: Mapping[str, list[Tensor]]) -> None:
    weight: Any = norm.weight
    if not readers.get(path):
        raise UnsupportedError(
            f"{path} multiplies what is added to the residual stream by gains that no matrix reads, so no rotation "
            f"can pass it; {_WITHOUT}"
        )
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, width, generator=generator) + 1).to(weight)
    matrix = _random(1, width, generator)[0].to(weight)
    original = weight.detach().clone()
    weight.fill_(1.0 - offset_of(norm, weight))
    with torch.autocast(x.device.type, enabled=False):
        after, before = norm(x @ matrix), norm(x) @ matrix
    weight.copy_(original)
    error = float((after - before).norm() / before.norm())
    if getattr(norm, "bias", None) is not None or not math.isfinite(error) or error > _COMMUTES:
        raise UnsupportedError(
            f"{path} ({type(norm).__name__}) does not commute with rotations (LayerNorm subtracts a mean, and may add "
            f"a bias); {_WITHOUT}"
        )
