"""The modes of all quantizers of a model at once: unquantized for a comparison, or as a server holds it."""

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from qat.float32 import float32_names, own_tensors, stored_dtype
from qat.quantizer import Mode, Quantizer, WeightQuantizer
from qat.sharded import share, swapped
from qat.sites import sites


@contextlib.contextmanager
def _in_mode(quantizers: Sequence[Quantizer], mode: Mode) -> Iterator[None]:
    before = [quantizer.mode for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.mode = mode
    try:
        yield
    finally:
        for quantizer, previous in zip(quantizers, before, strict=True):
            quantizer.mode = previous


@contextlib.contextmanager
def dense(model: nn.Module, inputs: bool = False, weights: bool = True) -> Iterator[None]:
    """Weights, and with `inputs` everything else, or that alone, pass through unquantized inside this context (inputs
    that are being observed always do)."""
    every = [module for module in model.modules() if isinstance(module, Quantizer)]
    with _in_mode([m for m in every if (weights if isinstance(m, WeightQuantizer) else inputs)], "dense"):
        yield


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Each weight is quantized once inside this context, at its first use; nothing may be changed inside."""
    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    try:
        with _in_mode(quantizers, "frozen"):
            yield
    finally:
        for quantizer in quantizers:
            quantizer.forget()


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Training passes inside this context put the weight of a linear layer on its grid once, at its first use: several
    micro-batches and recomputed activations share it, gradients stay those of each pass. The quantized weights take
    their memory to the end; no parameter may be changed inside."""
    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    try:
        for quantizer in quantizers:
            quantizer.holds = True
        yield
    finally:
        for quantizer in quantizers:
            quantizer.holds = False
            quantizer.forget()


@contextlib.contextmanager
def only(model: nn.Module, paths: Collection[str], others: bool = False) -> Iterator[None]:
    """Everything passes through unquantized inside this context but the weights of these paths and what they are
    multiplied with; with `others`, nothing does but those."""
    named = [site for site in sites(model, "weight") if site.path in paths]
    chosen = {id(quantizer) for site in named for quantizer in (site.quantizer, site.input)}
    every = [module for module in model.modules() if isinstance(module, Quantizer)]
    with _in_mode([quantizer for quantizer in every if (id(quantizer) in chosen) == others], "dense"):
        yield


@contextlib.contextmanager
def served(model: nn.Module) -> Iterator[None]:
    """The model as an export stores it, inside this context: what is not quantized has its value in `stored_dtype`,
    unless the model keeps it in float32, and on a CPU each weight is quantized once instead of at every call. Nothing
    may be trained inside. What is dense stays dense."""
    on_cpu = [m for m in model.modules() if isinstance(m, WeightQuantizer) and m.start.device.type == "cpu"]
    quantizers = [quantizer for quantizer in on_cpu if quantizer.mode == "quantized"]
    on_grid = {id(getattr(site.owner, site.slot)) for site in sites(model, "weight")}  # None where it is held packed
    on_grid |= {id(p) for module in model.modules() for p in getattr(module, "before_rounding", list)()}
    unrounded = float32_names(model)
    own = {id(t): t for name, t in own_tensors(model).items() if t.is_floating_point() and name not in unrounded}
    dense = [tensor for key, tensor in own.items() if key not in on_grid]
    try:
        dtype = stored_dtype(model)
        rounded = ((tensor, share(tensor).to(dtype).to(tensor.dtype)) for tensor in dense)
        with swapped(rounded), _in_mode(quantizers, "frozen"):
            yield
    finally:
        for quantizer in quantizers:
            quantizer.forget()
