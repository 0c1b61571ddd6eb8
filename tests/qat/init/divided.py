"""Initialisations of a tiny model: as one process does it, and as one of several that hold it together (a program).

    python -m tests.qat.init.divided RANK SIZE STORE FOLDER

Each case is saved as FOLDER/CASE.safetensors by the first rank; every rank saves what it said and what it held.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from qat import sharded
from qat.checkpoints.initialised import Initialised
from qat.checkpoints.resume import student_tensors
from qat.init.blocks import Block
from qat.init.calibration import initialise, observe
from qat.init.gptq import Gptq
from qat.init.hadamard import Hadamard
from qat.init.scales import ScaleSearch
from qat.init.smooth import Smooth
from qat.init.step import InitStep
from qat.init.together import Together
from qat.scheme import Scheme
from qat.sites import Site
from qat.surgery import apply
from tests.qat.test_surgery import MOE, batches, build, rules, usual

BLOCKS = 3
BATCHES = 2  # one for each process: sums over them have one order
MORE = 4
STOPPED = 2  # block before which a walk ends


class Stopped(Exception):
    pass


class Counted(Gptq):
    """Notes which blocks it works on."""

    seen: ClassVar[list[str]] = []

    def run_block(self, block: Block) -> Counter[str]:
        self.seen.append(block.path)
        return super().run_block(block)


def scheme(*init: InitStep, weight: str = "nvfp4", **fields: Any) -> Scheme:
    return usual(weight, "nvfp4", learn="dual_lsq", **fields).model_copy(update={"init": init})


FIT = {"choose": "arrival", "refit": 1}
CASES: dict[str, tuple[str, Scheme]] = {
    "walk": ("llama", scheme(Counted(sequential=True, correction=0.5, **FIT))),
    "more": ("llama", scheme(Counted(sequential=True))),
    "asymmetric": ("llama", scheme(Counted(sequential=True), weight="int4_g32_asym")),
    "experts": ("qwen3_moe", scheme(Counted(sequential=True, **FIT))),
    "apart": ("llama", scheme(Gptq())),
    "moved": ("llama", scheme(Smooth(), Hadamard(), ScaleSearch())),
    "observed": ("llama", scheme(ScaleSearch(), observer="percentile")),
    "head": (
        "llama",
        rules(("*_proj", "int4_g64"), ("lm_head", "int4_g64"), ("*", None)).model_copy(
            update={"init": (Counted(sequential=True),)}
        ),
    ),
}


def made(kind: str, scheme: Scheme, divided: int = 0) -> nn.Module:
    model = build(kind, **{**(MOE if kind == "qwen3_moe" else {}), "num_hidden_layers": BLOCKS})
    apply(model, scheme, defer_init=True)
    if divided:
        sharded.divide(model, torch.device("cpu"), divided)
    return model


def held(model: nn.Module) -> int:
    """Bytes of tensors in this process."""
    return sum(sharded.share(t).nbytes for t in (*model.parameters(), *model.buffers()))


def initialised(
    model: nn.Module, scheme: Scheme, store: Any = None, stop: int = 99, text: int = BATCHES
) -> tuple[dict[str, Tensor], list[str], int]:
    """Its tensors, what was said, and the most bytes that it held of the model."""
    most = [0]

    def track(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for number, item in enumerate(found.items()):
            if number == stop and isinstance(item[1], nn.Module):
                raise Stopped
            yield item

    def watched(self: Together, sites: Sequence[Site], places: Sequence[int] | None = None) -> None:
        most[0] = max(most[0], held(model))
        _spread(self, sites, places)

    given = list(batches(text))
    Counted.seen.clear()
    with mock.patch.object(Together, "spread", watched):  # which only looks on
        said = initialise(model, given, scheme, observe(model, given), track, store)
    return student_tensors(model), said, most[0]


_spread = Together.spread


def main(rank: int, size: int, store: str, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    told: dict[str, Any] = {}
    for name, (kind, given) in CASES.items():
        model = made(kind, given, size)
        share = held(model)
        tensors, said, most = initialised(model, given, text=MORE if name == "more" else BATCHES)
        told[name] = {"said": said, "share": share, "most": most, "seen": list(Counted.seen)}
        save_file(tensors, folder / f"{name}-{rank}.safetensors")
    kind, given = CASES["walk"]
    kept = Initialised(folder / "run", rank == 0)
    for attempt, stop in enumerate((STOPPED, 99)):
        try:
            model = made(kind, given, size)
            tensors, said, _ = initialised(model, given, kept, stop)
            save_file(tensors, folder / f"resumed-{rank}.safetensors")
        except Stopped:
            pass
        distributed.barrier()  # the first rank writes what is kept; the other may be past it
        told[f"attempt {attempt}"] = {"seen": list(Counted.seen), "kept": len(kept), "said": said}
        distributed.barrier()
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
