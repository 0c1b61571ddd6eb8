"""One cell of benchmarks/peers_recovery.py, in a peer's own environment: quantize with its tool, judge, write down.

    python worker.py CELL.json RESULT.json

A cell names the tool, its method, the folder of the BF16 model and the file of token rows; with_<tool>.py beside this
file turns the model into a quantized one. Everything that judges stands here and needs torch and transformers alone, so
that every environment judges with the same lines: forward under bfloat16 autocast from float32 copies of the weights,
KL(teacher || student), next-token loss and top-1 in float32, token by token, on rows whose documents are kept apart by
their position ids. The matrix products are looked at as well: a row that does not multiply what its format can hold
is no number.
"""

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

IGNORE, BATCH, CHUNK = -100, 2, 512
MAGNITUDES = 9  # that four bits can hold: 0 to 8 as integers, eight as E2M1
PACKAGES = ("torch", "transformers", "auto-round", "llmcompressor", "compressed-tensors", "nvidia-modelopt", "torchao")


def load(folder: str, dtype: torch.dtype) -> Any:
    """The model of a folder, ready to be evaluated."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: nn.Module, rows: dict[str, Tensor], begin: int) -> Tensor:
    """Of a few rows from `begin` on: (tokens, vocabulary)."""
    part = slice(begin, begin + BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        out: Any = model(
            input_ids=rows["input_ids"][part], position_ids=rows["position_ids"][part], use_cache=False
        ).logits
    return out.flatten(0, 1)


@torch.no_grad()
def judge(student: nn.Module, teacher: nn.Module, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """KL to the teacher, next-token loss and whether the top choice is the same, of every token with a target."""
    found: dict[str, list[Tensor]] = {"kl": [], "nll": [], "top1": []}
    for begin in range(0, len(rows["input_ids"]), BATCH):
        own, other = logits(student, rows, begin), logits(teacher, rows, begin)
        targets = rows["targets"][begin : begin + BATCH].flatten()
        keep = (targets != IGNORE).nonzero().squeeze(1)
        for part in keep.split(CHUNK):
            log_q, log_p = own[part].float().log_softmax(-1), other[part].float().log_softmax(-1)
            found["nll"].append(-log_q.gather(1, targets[part, None]).squeeze(1))
            found["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
            found["top1"].append((log_p.argmax(-1) == log_q.argmax(-1)).float())
    return {name: torch.cat(parts) for name, parts in found.items()}


def magnitudes(values: Tensor, group: int) -> int:
    """The largest number of distinct magnitudes in a group along the last dimension."""
    ordered = values.detach().float().abs().reshape(-1, group).sort(-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


class Products(TorchDispatchMode):
    """Counts matrix products whose weight, and whose input, has four bits: few magnitudes in every group."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group, self.weights, self.inputs = group, 0, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            value, weight = args[-2], args[-1].t()
            if weight.shape[1] % self.group == 0:
                self.weights += magnitudes(weight, self.group) <= MAGNITUDES
                self.inputs += magnitudes(value, self.group) <= MAGNITUDES
        return operator(*args, **(kwargs or {}))


@torch.no_grad()
def products(model: nn.Module, rows: dict[str, Tensor], group: int) -> tuple[int, int]:
    """How many of a forward pass have a four-bit weight, and a four-bit input."""
    with Products(group) as counts:
        model(input_ids=rows["input_ids"][:1, :64], use_cache=False)
    return counts.weights, counts.inputs


def run(cell: dict[str, Any], scores: Path) -> dict[str, Any]:
    """What a cell came to; token by token in the file `scores`."""
    texts = load_file(cell["texts"])
    named = sorted({key.partition(".")[0] for key in texts})
    rows = {name: {k.partition(".")[2]: v for k, v in texts.items() if k.startswith(f"{name}.")} for name in named}
    tool = importlib.import_module(f"with_{cell['tool'].replace('-', '_')}")
    began, worked = time.perf_counter(), time.process_time()
    student = tool.quantize(cell, rows).float().eval()
    cost = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    judged = [name for name in named if name.startswith("heldout")]
    weights, inputs = products(student, rows[judged[0]], cell["group"])
    teacher = load(cell["model"], torch.float32)
    result: dict[str, Any] = {**cost, "four_bit_weights": weights, "four_bit_inputs": inputs, "scores": {}}
    kept = {}
    for name in judged:
        found = judge(student, teacher, rows[name])
        means = {key: float(value.double().mean()) for key, value in found.items()}
        result["scores"][name] = means | {"tokens": len(found["kl"])}
        kept |= {f"{name}.{key}": value for key, value in found.items()}
    save_file(kept, scores)
    return result


def versions() -> dict[str, str]:
    """Of every package that is installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def reason(error: BaseException) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def main() -> None:
    """Run one cell; an error of the tool is a result, too."""
    cell_path, out = Path(sys.argv[1]), Path(sys.argv[2])
    cell = json.loads(cell_path.read_text())
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(cell.get("seed", 0))
    result: dict[str, Any] = {"threads": threads, "versions": versions()}
    try:
        result |= run(cell, out.with_suffix(".safetensors"))
    except Exception as error:
        import traceback

        traceback.print_exc()
        result["error"] = reason(error)
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
