"""How near the gradient from a cached teacher is to the one from the teacher itself, by kind of cache, at equal bytes.

A student in INT4 (64 weights per scale) reads the text that its teacher, the embedded SmolLM2-135M, reads. The gradient
of the forward KL by all trained weights is taken from the teacher's whole rows, and from what each kind of cache keeps
of them, rounded as its files round. A kind that draws does so several times: each error is of one drawing, and "mean"
of the mean over all, which falls with their number where the kind is unbiased.

    python benchmarks/teacher_cache.py [--tokens 512] [--k 64] [--draws 4] [--init rtn|scales] [--json FILE]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat import Rule, Scheme, apply, calibrate
from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, resolve
from qat.trainers.data import Blocks, DataConfig, load_blocks
from qat.trainers.forward import Head, hidden_states, split
from qat.trainers.logitcache import TeacherCache
from qat.training.known import Known, drawn, joined, likeliest, thinned
from qat.training.losses import IGNORE, chunked
from qat.training.objectives import ForwardKL

ROW = 512
STORED = (torch.int32, torch.float16, torch.float32, torch.float32)
KINDS: dict[str, Callable[[Tensor, int, torch.Generator], Known]] = {
    "topk": lambda logits, k, _: likeliest(logits, k),
    "sample": drawn,
    "hybrid": thinned,
}


def models(init: str, tokens: int) -> tuple[Any, Any, Blocks]:
    """Student, teacher, and rows of the shipped text."""
    folder = resolve(ModelConfig(id="embedded:smollm2-135m"))
    teacher, student = (load_model(folder, torch.float32).eval() for _ in range(2))
    blocks = load_blocks(DataConfig(source="heldout/choosing", seq_len=ROW), load_tokenizer(folder), num_tokens=tokens)
    skipped = [Rule(match=name, skip="kept in BF16") for name in ("lm_head", "model.embed_tokens")]
    steps = [] if init == "rtn" else [{"kind": init}]
    scheme = Scheme.model_validate({"rules": [*skipped, Rule(match="*_proj", weight="int4_g64")], "init": steps})
    apply(student, scheme)
    calibrate(student, [{"input_ids": blocks.rows([0])["input_ids"]}], scheme)
    student.get_input_embeddings().weight.requires_grad_(False)
    return student, teacher, blocks


def kept(logits: Tensor, kind: str, k: int, generator: torch.Generator) -> Known:
    """As it comes back from a file."""
    known = joined([KINDS[kind](part, k, generator) for part in logits.split(256)])
    return Known(*(None if c is None else c.to(dtype) for c, dtype in zip(known, STORED, strict=True)))


def gradient(student: Any, head: Head, blocks: Blocks, say: Callable[[Any], dict[str, Any]]) -> tuple[float, Tensor]:
    """Mean loss per token, and the gradient by all that is trained, as one vector."""
    student.zero_grad(set_to_none=True)
    total, tokens = 0.0, 0
    for row in range(len(blocks)):
        batch = blocks.rows([row])
        said = {"teacher_hidden": None, "teacher_head": None, **say(batch)}
        loss = chunked(ForwardKL(), hidden_states(student, batch), head, targets=batch["targets"], **said)
        loss.backward()
        total, tokens = total + loss.item(), tokens + int((batch["targets"] != IGNORE).sum())
    return total / tokens, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]) / tokens


def compared(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative error and cosine, in float64."""
    error, cosine, norms = 0.0, 0.0, [0.0, 0.0]
    for a, b in zip(found.split(1 << 24), exact.split(1 << 24), strict=True):
        a, b = a.double(), b.double()
        error, cosine = error + (a - b).square().sum().item(), cosine + (a @ b).item()
        norms = [norms[0] + (a @ a).item(), norms[1] + (b @ b).item()]
    return (error / norms[1]) ** 0.5, cosine / (norms[0] * norms[1]) ** 0.5


def measure(kind: str, options: argparse.Namespace, trained: tuple[Any, Head, Blocks], logits: list[Tensor],
            exact: tuple[float, Tensor]) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    student, head, blocks = trained
    draws = 1 if kind == "topk" else options.draws
    errors, cosines, losses = [], [], []
    mean = torch.zeros_like(exact[1])
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        rows = iter([kept(row, kind, options.k, generator) for row in logits])
        loss, found = gradient(student, head, blocks, lambda _, rows=rows: {"known": next(rows)})
        error, cosine = compared(found, exact[1])
        errors, cosines, losses = [*errors, error], [*cosines, cosine], [*losses, loss]
        mean += found / draws
    each = TeacherCache(kind=kind, k=options.k).bytes_per_token
    values = [statistics.mean(losses), statistics.mean(errors), statistics.mean(cosines), compared(mean, exact[1])[0]]
    row = dict(zip(("loss", "error", "cosine", "error of the mean"), values, strict=True))
    loss, error, cosine, of_mean = values
    print(
        f"{kind:7} {each:5} B  loss {loss:.4f}  error {error:.4f}  cosine {cosine:.5f}  mean {of_mean:.4f}", flush=True
    )
    return {"kind": kind, "bytes": each, "draws": draws, **row}


def main() -> None:
    """Measure and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=ROW)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--init", default="rtn", choices=("rtn", "scales"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    student, teacher, blocks = models(options.init, options.tokens)
    head, other = split(student), split(teacher)
    with torch.no_grad():
        hidden = [hidden_states(teacher, blocks.rows([row])) for row in range(len(blocks))]
        targets = [blocks.rows([row])["targets"] for row in range(len(blocks))]
        logits = [other(states[learned != IGNORE]) for states, learned in zip(hidden, targets, strict=True)]
    whole = iter(hidden)
    exact = gradient(student, head, blocks, lambda _: {"teacher_hidden": next(whole), "teacher_head": other})
    print(f"{sum(map(len, logits))} tokens, KL {exact[0]:.4f}", flush=True)
    rows = [measure(kind, options, (student, head, blocks), logits, exact) for kind in KINDS]
    if options.json:
        options.json.write_text(json.dumps({"kl": exact[0], "tokens": sum(map(len, logits)), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
