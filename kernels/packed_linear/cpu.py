"""The packed linear kernels on CPUs: five roads, by the number of tokens, their dtype and the processor.

The words are those of the GPU (`triton.py` draws them); scales and zero points lie (rows, groups) in memory here,
because a core walks along one row.

* registers (`cpu.c`): each core decodes its rows into registers and multiplies at once; reading them from memory is the
  bound. Exact decoding, float32 sums. One token; up to FOUR without AMX, up to FEW in other dtypes than BF16.
* tiles, dots (`cpu_bf16.c`): BF16 tokens on CPUs that multiply BF16. A block of rows is decoded to BF16 in the cache,
  rounded as every engine that dequantizes rounds it, and multiplied there with float32 sums: by AMX from two tokens on,
  without it by AVX-512 BF16 up to SOME.
* lanes (`cpu_avx2.c`): all tokens of every dtype on CPUs with AVX2 and no AVX-512. Codes are looked up, one token meets
  them in registers, more in the cache; float32 weights that nothing rounds, float32 sums.
* slices: many tokens elsewhere. A slice of rows that fits the cache is decoded into dense numbers of x's dtype, and the
  library's product, which then bounds the speed, reads it from there.

Within a road a token's result is the same whichever tokens go with it, but in slices, whose order is the library's.
"""

import ctypes
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qat.errors import FormatError, UnsupportedError
from qat.kernels.compiler import load_library
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.scale import BF16, F16, F32
from qat.serving.packed import problem as packing_problem
from qat.serving.packed import reference
from qat.serving.words import PART, tile

FEW = 8  # tokens up to which decoding in registers beats a dense slice
FOUR, SOME = 4, 32  # dots: above four tokens, which registers multiply at once; later slices, the library's own sums
SLICE_BYTES = 4 << 20  # of dense weights at a time: they should stay in the cache
_DOTS, _TILES = 1, 2  # of cpu_bf16.c
_thread = threading.local()
_NO_MEMORY = 2
_WHOLE_ROW = 40  # a shift that leaves one group per row


class _Weight(ctypes.Structure):
    """`Weight` of cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros", "bias", "table", "scale_table")),
        ("global_scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width", "groups")),
        *(
            (name, ctypes.c_int32)
            for name in ("group_shift", "bits", "scale_bytes", "bias_bytes", "minifloat_mantissa")
        ),
        ("step", ctypes.c_float),
        ("half_scales", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        OSError: it cannot be compiled here.
    """
    shared = load_library(Path(__file__).with_name("cpu.c"))
    pointer, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    shared.packed_linear.argtypes = [pointer, pointer, whole, flag, pointer, flag]
    shared.dense_rows.argtypes = [pointer, whole, whole, pointer, flag, flag]
    return shared


@cache
def _bf16_library() -> tuple[ctypes.CDLL | None, int]:
    """`cpu_bf16.c` and the roads that it has here; none where it cannot be compiled, which leaves the others."""
    try:
        shared = load_library(Path(__file__).with_name("cpu_bf16.c"))
    except OSError:
        return None, 0
    pointer, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    shared.bf16_memory.argtypes, shared.bf16_memory.restype = [pointer, whole, flag, flag], whole
    shared.bf16_linear.argtypes = [pointer, pointer, whole, pointer, pointer, flag, flag]
    return shared, shared.bf16_roads()


@cache
def _avx2_library() -> ctypes.CDLL | None:
    """`cpu_avx2.c`, or None where it cannot be compiled or the processor has less, or more (AVX-512)."""
    try:
        shared = load_library(Path(__file__).with_name("cpu_avx2.c"))
    except OSError:
        return None
    pointer, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    shared.avx2_memory.argtypes, shared.avx2_memory.restype = [pointer, whole, flag], whole
    shared.avx2_linear.argtypes = [pointer, pointer, whole, flag, pointer, pointer, flag]
    return shared if shared.avx2_here() else None


def road(tokens: int, dtype: torch.dtype) -> str:
    """How so many tokens of this dtype are multiplied here: "lanes", "registers", "tiles", "dots" or "slices"."""
    if _avx2_library() is not None:
        return "lanes"
    if tokens > 1 and dtype == torch.bfloat16:
        roads = _bf16_library()[1]
        if roads & _TILES:
            return "tiles"
        if roads & _DOTS and FOUR < tokens <= SOME:
            return "dots"
    return "registers" if tokens <= FEW else "slices"


@cache
def _tables(name: str) -> tuple[Tensor, Tensor | None]:
    """float32 value of every code as words hold it, and of every byte of a one-byte scale.

    Cached by name: the hash of a Format goes over all its values.
    """
    fmt = lookup(name)
    codes = torch.arange(2**fmt.element.bits, dtype=torch.uint8)
    if fmt.element.is_integer:  # words count from the lowest value
        codes = codes ^ (1 << (fmt.element.bits - 1))
    values = fmt.element.decode(codes).contiguous()
    if not fmt.scale.is_bytes:
        return values, None
    return values, fmt.scale.decode(fmt.scale.from_bytes(torch.arange(256, dtype=torch.uint8))).contiguous()


def _weight(
    fmt: Format, columns: int, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, factor: float
) -> _Weight:
    """Pointers into tensors that the caller keeps alive; scales and zero points (rows, groups)."""
    table, scale_table = _tables(fmt.name)
    minifloat = fmt.element.is_minifloat
    return _Weight(
        words.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if bias is None else bias.data_ptr(),
        table.data_ptr(),
        None if scale_table is None else scale_table.data_ptr(),
        factor,
        words.shape[0],
        columns,
        words.shape[1],
        scales.shape[1],
        fmt.group.bit_length() - 1 if fmt.group else _WHOLE_ROW,
        fmt.element.bits,
        scales.element_size(),
        0 if bias is None else bias.element_size(),
        fmt.element.mantissa_bits if minifloat else -1,
        fmt.element.min_normal / 2**fmt.element.mantissa_bits if minifloat else 1.0,
        scales.dtype == torch.float16,
    )


def _plain(bias: Tensor | None) -> Tensor | None:
    """A bias in one of the dtypes of cpu.c."""
    if bias is None or bias.dtype == torch.bfloat16:
        return None if bias is None else bias.contiguous()
    return bias.to(torch.float32).contiguous()


def prepare_packed(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    global_scale: float,
    format: str,
    columns: int,
) -> Tensor:
    """The operator `qat::prepare_packed` on a CPU: the bytes of cpu.c's `Weight`, whose pointers lead into these
    tensors; nothing where cpu.c needs copies of them, or does not take the format."""
    if problem(lookup(format)) is not None:
        return words.new_empty(0, dtype=torch.uint8)
    weight, ordered = _describe(words, scales, zeros, bias, (format, columns, global_scale))
    same = (a is b is None or _is_view(a, b) for a, b in zip(ordered, (words, scales, zeros, bias), strict=True))
    return torch.frombuffer(bytearray(weight), dtype=torch.uint8) if all(same) else words.new_empty(0).to(torch.uint8)


def _is_view(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.data_ptr() == b.data_ptr()


def _still_describes(
    weight: _Weight, columns: int, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether a layer's tensors are those that it was prepared for: `tensor.data = other` goes by unseen."""
    return (
        weight.words == words.data_ptr()
        and weight.scales == scales.data_ptr()
        and weight.zeros == (None if zeros is None else zeros.data_ptr())
        and weight.bias == (None if bias is None else bias.data_ptr())
        and (weight.rows, weight.width) == words.shape
        and weight.columns == columns
        and weight.groups == scales.shape[0]
        and weight.scale_bytes == scales.element_size()
        and weight.bias_bytes == (0 if bias is None else bias.element_size())
        and words.is_contiguous()
        and scales.t().is_contiguous()
        and (zeros is None or zeros.t().is_contiguous())
        and (bias is None or bias.is_contiguous())
    )


def _describe(
    words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, about: tuple[str, int, float]
) -> tuple[_Weight, tuple[Tensor | None, ...]]:
    """What cpu.c reads, and the tensors to keep alive for it."""
    name, columns, factor = about
    fmt = lookup(name)
    _check(fmt, columns, words, scales, zeros, bias)
    half = scales.dtype == torch.float16 and _avx2_library() is None  # which the other roads do not decode
    wide = scales.to(torch.float32) if half else scales
    ordered = (
        words.contiguous(),
        wide.t().contiguous(),
        None if zeros is None else zeros.t().contiguous(),
        _plain(bias),
    )
    return _weight(fmt, columns, *ordered, factor), ordered


def _check(fmt: Format, columns: int, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> None:
    """Refuse what would read memory of other tensors."""
    rows = words.shape[0]
    width, grid = -(-columns // tile(fmt.element.bits)) * PART, fmt.grid_shape(rows, columns)[::-1]
    if words.shape[1] != width or tuple(scales.shape) != grid:
        raise FormatError(
            f"an input of width {columns} needs words {[rows, width]} and scales {[*grid]} in {fmt.name}; "
            f"given {[*words.shape]} and {[*scales.shape]}"
        )
    if words.dtype != torch.int16 or (zeros is not None and zeros.dtype != torch.int8):
        dtypes = f"{words.dtype}{'' if zeros is None else f' and {zeros.dtype}'}"
        raise FormatError(f"words must be int16 and zero points int8; given {dtypes}")
    if (zeros is None) == fmt.zero_point:
        raise FormatError(f"{fmt.name} has {'' if fmt.zero_point else 'no '}zero points")
    stored = torch.uint8 if fmt.scale.is_bytes else fmt.scale.storage
    if scales.dtype not in (stored, torch.float32):
        raise FormatError(f"{fmt.name} scales must be {stored} or float32, not {scales.dtype}")
    if (zeros is not None and zeros.shape != scales.shape) or (bias is not None and bias.shape != (rows,)):
        raise FormatError(f"zero points must be {[*grid]}, and a bias {[rows]}")


def packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    global_scale: float,
    format: str,
    prepared: Tensor | None = None,
) -> Tensor:
    """The operator `qat::packed_linear` on a CPU; `prepared` by `prepare_packed`, of these tensors.

    Raises:
        FormatError: words, scales, zeros or bias of another shape or dtype than the format and x ask for.
        UnsupportedError: a gradient is wanted; `qat.serving.packed.packed_linear` refuses it in the backward pass only.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise UnsupportedError("qat::packed_linear has no gradient: packed weights are for inference")
    columns, rows = x.shape[-1], words.shape[0]
    ordered: tuple[Tensor | None, ...] = ()
    weight = _Weight.from_address(prepared.data_ptr()) if prepared is not None and prepared.numel() else None
    if weight is None or not _still_describes(weight, columns, words, scales, zeros, bias):
        if problem(lookup(format)) is not None:
            return reference(x, words, scales, zeros, bias, global_scale, format)
        weight, ordered = _describe(words, scales, zeros, bias, (format, columns, global_scale))
    dtype = x.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        x = x.to(torch.float32)
    x = x.contiguous()
    tokens = x.shape[:-1].numel()
    way = road(tokens, x.dtype)
    if way == "slices":
        out = _by_slices(x.view(tokens, columns), weight, rows, bias).view(*x.shape[:-1], rows)
    else:
        out = x.new_empty(*x.shape[:-1], rows)
        if way == "lanes":
            _in_lanes(x, tokens, weight, out)
        elif way == "registers":
            arguments = (x.data_ptr(), tokens, x.element_size(), out.data_ptr(), torch.get_num_threads())
            _check_status(library().packed_linear(ctypes.byref(weight), *arguments))
        else:
            _in_bf16(x, tokens, weight, out, _TILES if way == "tiles" else _DOTS)
    del ordered  # alive until here
    return out if out.dtype == dtype else out.to(dtype)


def _in_bf16(x: Tensor, tokens: int, weight: _Weight, out: Tensor, which: int) -> None:
    shared, threads = _bf16_library()[0], torch.get_num_threads()
    assert shared is not None
    memory = _scratch(shared.bf16_memory(ctypes.byref(weight), tokens, threads, which), torch.uint8)
    arguments = (x.data_ptr(), tokens, out.data_ptr(), memory.data_ptr(), threads, which)
    _check_status(shared.bf16_linear(ctypes.byref(weight), *arguments))


def _in_lanes(x: Tensor, tokens: int, weight: _Weight, out: Tensor) -> None:
    shared, threads = _avx2_library(), torch.get_num_threads()
    assert shared is not None
    memory = _scratch(shared.avx2_memory(ctypes.byref(weight), tokens, threads), torch.uint8)
    arguments = (x.data_ptr(), tokens, x.element_size(), out.data_ptr(), memory.data_ptr(), threads)
    _check_status(shared.avx2_linear(ctypes.byref(weight), *arguments))


def _by_slices(x: Tensor, weight: _Weight, rows: int, bias: Tensor | None) -> Tensor:
    columns, size = x.shape[-1], x.element_size()
    step = max(1, min(rows, SLICE_BYTES // max(columns * size, 1)))
    dense, bias = _scratch(step * columns, x.dtype).view(step, columns), None if bias is None else bias.to(x.dtype)
    out: Tensor | None = None
    for first in range(0, rows, step):
        last = min(first + step, rows)
        _check_status(
            library().dense_rows(ctypes.byref(weight), first, last, dense.data_ptr(), size, torch.get_num_threads())
        )
        piece = functional.linear(x, dense[: last - first], None if bias is None else bias[first:last])
        if last - first == rows:
            return piece
        out = x.new_empty(x.shape[0], rows) if out is None else out
        out[:, first:last] = piece
    return x.new_empty(x.shape[0], rows) if out is None else out


def _scratch(values: int, dtype: torch.dtype) -> Tensor:
    """The thread's own memory for slices: fresh memory would be cleared page by page at every call."""
    buffer: Tensor | None = getattr(_thread, "memory", None)
    needed = values * dtype.itemsize
    if buffer is None or buffer.numel() < needed:
        with torch.inference_mode(False):  # one that any later call may write to
            buffer = _thread.memory = torch.empty(max(needed, SLICE_BYTES), dtype=torch.uint8)
    return buffer[:needed].view(dtype)


def _check_status(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the input in float32")
    if status:
        raise RuntimeError("cpu.c has no decoder for an element that `problem` says it has")


def problem(fmt: Format) -> str | None:
    """Why cpu.c does not multiply weights of this format, or None."""
    reason, element = packing_problem(fmt), fmt.element
    if reason is not None:
        return reason
    if not (element.is_integer or (element.bits, element.mantissa_bits) in ((4, 1), (8, 3))):
        return f"cpu.c has no instance for {element.name}"
    if not (fmt.scale.is_bytes or fmt.scale.is_one_of(F32, BF16, F16)):
        return f"cpu.c does not decode {fmt.scale} scales"
    return None
