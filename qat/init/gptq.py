"""Error-compensated rounding: GPTQ (arXiv 2210.17323) as a start for training.

Columns are rounded one after another; what a column loses is made up for by the columns still to come, as far as the
inputs seen in calibration are correlated. The result is not codes but *latent* weights that round to them, so that
everything else (fake quantization, learned scales, export) goes on as from any other start.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qat.errors import FormatError
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, rounded

# Share of the mean diagonal added to it. Ten times the paper's: directions that calibration hardly excites are not
# free,
# since served inputs are quantized themselves and come from other text.
DAMPING = 0.1
_TOGETHER = 64  # columns between two updates of everything to their right


def compensate(weight: Tensor, fmt: Format, scales: Scales, gram: Tensor) -> Tensor:
    """Latent weights whose nearest rounding is the GPTQ solution.

    Args:
        weight: (rows, columns).
        fmt: a format whose blocks lie within one row.
        scales: fixed scales of `weight`.
        gram: (columns, columns) mean of x x^T over the layer's inputs x.

    Raises:
        FormatError: the format's blocks span several rows.
    """
    rows, columns = weight.shape
    if not fmt.is_rowwise:
        raise FormatError(f"{fmt.name}: error compensation needs blocks within one row; use compensate: none")
    upper = _inverse_factor(gram)
    width = fmt.block_for(rows, columns)[1]
    work = weight.detach().to(torch.float32).t().contiguous()  # (columns, rows): one column is contiguous
    for start in range(0, columns, _TOGETHER):
        stop = min(start + _TOGETHER, columns)
        errors = torch.empty(stop - start, rows, device=weight.device)
        for column in range(start, stop):
            values = work[column]
            lost = (values - _round_column(values, fmt, scales, column // width)) / upper[column, column]
            errors[column - start] = lost
            work[column + 1 : stop] -= torch.outer(upper[column, column + 1 : stop], lost)
        work[stop:] -= upper[start:stop, stop:].t() @ errors
    return work.t().contiguous().to(weight.dtype)


def _round_column(values: Tensor, fmt: Format, scales: Scales, block: int) -> Tensor:
    """Quantized values of one column (rows,) whose scales stand in block column `block`."""
    part = slice(block, block + 1)
    own = replace(
        scales,
        stored=scales.stored[:, part],
        zero_point=None if scales.zero_point is None else scales.zero_point[:, part],
        choice=None if scales.choice is None else scales.choice[:, part],
        divisor=None,
    )
    return rounded(values.view(-1, 1, 1, 1), fmt, own).view(-1) * own.effective().view(-1)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Gram matrix; inputs that were always zero count as one."""
    matrix = gram.to(torch.float64).clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    damping = DAMPING * diagonal.mean()
    for _ in range(4):  # float32 sums over few tokens may leave a slightly negative direction: damp ten times more
        diagonal += damping
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(torch.float32)
        damping = damping * 10
    raise FormatError("the inputs' second moments are not positive definite; calibrate on more, or other, text")
