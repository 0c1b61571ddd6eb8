"""The training loop that modelopt and torchao leave to their users, with the settings of our recipes.

AdamW; a learning rate that warms up over 5 % of the steps and falls by a cosine to a tenth; gradients clipped to norm
1; embeddings frozen; bfloat16 autocast over float32 weights. Rows come in the order of the file, and documents are kept
apart. The loss is the peer's own where it has one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from worker import IGNORE

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Mean KL(teacher || student) of the tokens with a target."""
    keep = targets != IGNORE
    log_q, log_p = student[keep].float().log_softmax(-1), teacher[keep].float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def cross_entropy(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss."""
    return nn.functional.cross_entropy(student.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def train(
    student: nn.Module, teacher: nn.Module, rows: dict[str, Tensor], lr: float, loss: Loss, batch: int = 2
) -> None:
    """One pass over the rows."""
    steps = len(rows["input_ids"]) // batch
    student.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator] # of transformers' models
    learned = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, round(0.05 * steps))

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    student.train()
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        given: dict[str, Any] = {k: rows[k][part] for k in ("input_ids", "position_ids")}
        with torch.autocast("cpu", torch.bfloat16):
            own = student(**given, use_cache=False).logits
            with torch.no_grad():
                other = teacher(**given, use_cache=False).logits
        value = loss(own, other, rows["targets"][part])
        value.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step} of {steps}: loss {value.item():.4f}", flush=True)
    student.eval()
