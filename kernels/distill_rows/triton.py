"""Losses between rows of logits in Triton: `qat::distill_rows`, whose meaning is in `qat/training/rows.py`.

One program per row, which walks over the vocabulary in tiles: once for the largest logit and the sum of exponentials of
both models, once more where the gradient needs the loss (or part of it) before its first element, and once to write the
gradient over the student's logits. Every lane keeps its own maximum and sum, so tiles cost no reduction, and one
exponential per logit: of the two that rescaling takes, one is always 1. What the last pass sums is normalised already,
so equal logits give a loss of exactly 0, where sums of unnormalised terms would cancel. All arithmetic is float32.

Memory bounds the speed: forward KL and cross-entropy read the logits twice and write the student's once, reverse KL and
Jensen-Shannon read them three times. A pass is not free of the memory by caches: rows under way at once (0.5 MB each
for 128,256 BF16 logits of two models) exceed the L2. Rows lie whole and contiguous; a thread holds `PER_THREAD`
neighbours.

Every thread reads an element before the same thread writes it, or before a reduction that synchronises the program.
"""

import math
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.launch import Call, Launch
from qat.training.rows import IGNORE, reference

TILE, PER_THREAD = 2048, 8  # logits of one model per step: 16 bytes of BF16 per thread
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NOTHING = tl.constexpr(-3.4e38)  # below every finite logit, yet -inf minus it is no NaN


@triton.jit
def advance(best, total, x, inverse):
    """Per lane: the maximum so far, and the sum of exp((logit - maximum) * inverse)."""
    e = tl.exp(-tl.abs(x - best) * inverse)
    more = x > best
    return tl.where(more, x, best), tl.where(more, total * e + 1.0, total + e)


@triton.jit
def merge(best, total, inverse):
    """The maximum of the lanes and the logarithm of their sum; NaN if a logit was NaN or inf, or all of them -inf."""
    top = tl.max(best, 0)
    return top, tl.log(tl.sum(total * tl.exp((best - top) * inverse), 0))


@triton.jit
def ratios(log_q, log_p, LOSS: tl.constexpr, log_b, log_rest):
    """What p and q are averaged over: log(p / m) and log(q / m) for jsd, else log(p / q) and log(q / p)."""
    if LOSS == "jsd":
        odds = log_q - log_p + (log_rest - log_b)
        soft = tl.log(1.0 + tl.exp(-tl.abs(odds)))
        return tl.minimum(-odds, 0.0) - soft - log_b, tl.minimum(odds, 0.0) - soft - log_rest
    else:
        return log_p - log_q, log_q - log_p


@triton.jit
def weighted(p, ratio):
    """p * ratio, and 0 where p is 0."""
    return tl.where(p == 0.0, 0.0, p * ratio)


@triton.jit
def distill_rows_kernel(
    student,
    teacher,
    targets,
    losses,
    V,
    stride_student,
    stride_teacher,
    temperature,
    beta,
    log_b,
    log_rest,
    scale,
    LOSS: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """losses (rows,); student (rows, V) becomes scale * d(sum of losses) / d(student)."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_student
    lane = tl.arange(0, BLOCK)
    inverse = 1.0 / temperature
    factor = temperature * scale
    if LOSS == "cross_entropy":
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < V)
        at_target = tl.load(student + target, mask=inside, other=float("nan")).to(tl.float32)
    else:
        teacher += row * stride_teacher

    # Pass 1: maxima and sums of exponentials, per lane.
    best_q = tl.full((BLOCK,), NOTHING, tl.float32)
    best_p = tl.full((BLOCK,), NOTHING, tl.float32)
    total_q = tl.zeros((BLOCK,), tl.float32)
    total_p = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        column = first + lane
        x = tl.load(student + column, mask=column < V, other=-float("inf")).to(tl.float32)
        best_q, total_q = advance(best_q, total_q, x, inverse)
        if LOSS != "cross_entropy":
            y = tl.load(teacher + column, mask=column < V, other=-float("inf")).to(tl.float32)
            best_p, total_p = advance(best_p, total_p, y, inverse)
    top_q, log_sum_q = merge(best_q, total_q, inverse)
    if LOSS != "cross_entropy":
        top_p, log_sum_p = merge(best_p, total_p, inverse)

    # Pass 2, where the gradient needs it: the mean of q over its ratios.
    mean_q = 0.0
    sum_q = tl.zeros((BLOCK,), tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    if LOSS == "reverse_kl" or LOSS == "jsd":
        for first in range(0, V, BLOCK):
            column = first + lane
            x = tl.load(student + column, mask=column < V, other=-float("inf")).to(tl.float32)
            y = tl.load(teacher + column, mask=column < V, other=-float("inf")).to(tl.float32)
            log_q = (x - top_q) * inverse - log_sum_q
            log_p = (y - top_p) * inverse - log_sum_p
            of_p, of_q = ratios(log_q, log_p, LOSS, log_b, log_rest)
            sum_q += weighted(tl.exp(log_q), of_q)
            if LOSS == "jsd":
                sum_p += weighted(tl.exp(log_p), of_p)
        mean_q = tl.sum(sum_q, 0)

    # Last pass: the gradient, over the logits.
    for first in range(0, V, BLOCK):
        column = first + lane
        x = tl.load(student + column, mask=column < V, other=-float("inf")).to(tl.float32)
        log_q = (x - top_q) * inverse - log_sum_q
        q = tl.exp(log_q)
        if LOSS == "cross_entropy":
            gradient = tl.where(column == target, q - 1.0, q)
            gradient = tl.where(inside, gradient, tl.where(target == IGNORE, 0.0, float("nan")))
        else:
            y = tl.load(teacher + column, mask=column < V, other=-float("inf")).to(tl.float32)
            log_p = (y - top_p) * inverse - log_sum_p
            of_p, of_q = ratios(log_q, log_p, LOSS, log_b, log_rest)
            if LOSS == "forward_kl":
                p = tl.exp(log_p)
                sum_p += weighted(p, of_p)
                gradient = q - p
            else:
                gradient = weighted(q, of_q - mean_q)
                if LOSS == "jsd":
                    gradient *= 1.0 - beta
        tl.store(student + column, (gradient * factor).to(student.dtype.element_ty), mask=column < V)

    if LOSS == "forward_kl":
        loss = tl.sum(sum_p, 0)
    elif LOSS == "reverse_kl":
        loss = mean_q
    elif LOSS == "jsd":
        loss = beta * tl.sum(sum_p, 0) + (1.0 - beta) * mean_q
    else:
        loss = tl.where(target == IGNORE, 0.0, log_sum_q - (at_target - top_q) * inverse)
    tl.store(losses + row, loss * temperature * temperature)


def constants(kind: str, vocabulary: int) -> dict[str, Any]:
    """Compile-time arguments."""
    return {"LOSS": kind, "IGNORE": IGNORE, "BLOCK": min(TILE, max(triton.next_power_of_2(vocabulary), 128))}


def warps(block: int) -> int:
    """So that a thread holds at most `PER_THREAD` logits of one model."""
    return max(1, block // (32 * PER_THREAD))


@cache
def _launch(kind: str, vocabulary: int) -> Launch:
    fixed = constants(kind, vocabulary)
    return Launch(distill_rows_kernel, **fixed, num_warps=warps(fixed["BLOCK"]))


@lru_cache(maxsize=1024)
def _call(kind: str, rows: int, vocabulary: int, *strides: int) -> Call:
    return _launch(kind, vocabulary).at((rows,), vocabulary, *strides)


def distill_rows(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    scale: float,
) -> Tensor:
    """The operator `qat::distill_rows` on a device that runs Triton.

    A target outside the vocabulary makes its row NaN, where the reference raises: looking would wait for the device.
    """
    both = [student_logits] if teacher_logits is None else [student_logits, teacher_logits]
    if any(logits.dtype not in DTYPES for logits in both):  # float64: for proofs, not for speed
        return reference(student_logits, teacher_logits, targets, kind, temperature, beta, scale)
    rows, vocabulary = student_logits.shape
    losses = student_logits.new_empty(rows, dtype=torch.float32)
    if rows == 0 or vocabulary == 0:
        return losses.zero_()
    work, *others = (logits if logits.stride(-1) == 1 else logits.contiguous() for logits in both)
    teacher = others[0] if others else None
    call = _call(kind, rows, vocabulary, work.stride(0), 0 if teacher is None else teacher.stride(0))
    call(
        (work, teacher, None if targets is None else targets.contiguous(), losses),
        float(temperature),
        float(beta),
        math.log(beta),
        math.log1p(-beta),
        float(scale),
    )
    if work is not student_logits:
        student_logits.copy_(work)
    return losses
