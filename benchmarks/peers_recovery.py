"""Other projects' quantizers beside ours: one model, one text budget, one held-out text, one judge, one table.

    python benchmarks/peers_recovery.py [--run RUN ...] [--tools auto-round ...] [--formats nvfp4 ...] [--out FOLDER]

Each tool runs in an environment of its own (`REQUIREMENTS`, installed below --environments once), reads the embedded
model as the BF16 folder that ours is made from, and the rows of tokens that our recipe calibrates and trains on, and is
judged in its own process by benchmarks/peer_recovery/worker.py: KL to the BF16 model, next-token loss and top-1 on the
rows of held-out text that our reports are made of. Ours come from the reports of finished runs (--run), or the shipped
recipes are run first. A cell that fails names its error; finished cells are kept, so an interrupted table goes on.

`passes` is what a method computes on: tokens that go forward (calibration), or forward and backward (tuning and
training), through each layer. Share of the KL gap closed: from our round-to-nearest of the same format.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "peer_recovery" / "worker.py"
RECIPES = {
    "int4_g64": "qad/smollm2-135m-int4-g64.yaml",
    "nvfp4": "qad/smollm2-135m-nvfp4.yaml",
    "mxfp4": "qad/smollm2-135m-mxfp4.yaml",
}
REQUIREMENTS = {
    "auto-round": ("torch==2.13.0", "transformers==5.24.0", "auto-round==0.16.1"),
    "llm-compressor": ("torch==2.13.0", "transformers==5.17.0", "llmcompressor==0.14.0.1"),
    "modelopt": ("torch==2.13.0", "nvidia-modelopt[hf]==0.47.0"),
    "torchao": ("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0", "torchao==0.18.0"),
}
DISTRIBUTIONS = {"llm-compressor": "llmcompressor", "modelopt": "nvidia-modelopt"}
HELDOUT = ("heldout/reporting", "heldout/choosing")  # the first decides the order and the gap


@dataclass(frozen=True)
class Cell:
    """One row of the table: a tool's method on a format.

    Attributes:
        text: which rows it may read beside those of the training, "calibration" or "train".
        passes: see the module, per row of 512 tokens of `text`; None is once over them.
        settings: keyword arguments of the tool, or of the training loop.
    """

    tool: str
    format: str
    method: str
    text: str = "calibration"
    passes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.tool}-{self.format}-{self.method}-{self.text}".replace(" ", "")


@dataclass(frozen=True)
class Texts:
    """A file of rows, and the digest of each text in it."""

    path: Path
    digests: dict[str, str]


def cells(rates: dict[str, float]) -> list[Cell]:
    """The table, what decides most first; `rates` are our recipes' learning rates, which training peers get, too."""
    rows: list[Cell] = []

    def tuned(format: str, iters: int, batch: int, text: str = "calibration", **more: Any) -> Cell:
        extended = " alg_ext" if more else ""
        return Cell(
            "auto-round", format, f"{iters} x {batch}{extended}", text, iters * batch * 512,
            {"iters": iters, "batch_size": batch, **more},
        )  # fmt: skip

    for name in RECIPES:
        rows += [tuned(name, 0, 8), tuned(name, 200, 1)]
    methods = {
        "int4_g64": ("rtn", "gptq", "awq+rtn", "awq+gptq"),
        "nvfp4": ("rtn", "gptq", "awq+rtn", "smoothquant+gptq"),
    }
    for name in RECIPES:
        rows += [Cell("llm-compressor", name, method) for method in methods.get(name, methods["nvfp4"])]
    for name, known in {"nvfp4": ("max", "awq_lite", "local_hessian", "four_over_six"), "int4_g64": ("max", "awq_lite"),
                        "mxfp4": ("max",)}.items():  # fmt: skip
        rows += [Cell("modelopt", name, method) for method in known]
    for name in ("nvfp4", "int4_g64", "mxfp4"):
        rows.append(Cell("modelopt", name, "max+qad", passes=81920, settings={"lr": rates[name]}))
    for name in RECIPES:
        rows.append(Cell("torchao", name, "prepared"))
        rows += [Cell("torchao", name, how, "train", 81920, {"lr": rates[name]}) for how in ("qad", "qat")]
    for name in RECIPES:  # its own default, eight times our training
        rows += [tuned(name, 200, 1, "train"), tuned(name, 200, 1, enable_alg_ext=True), tuned(name, 200, 8)]
    return rows


def environment(tool: str, folder: Path) -> Path:
    """The Python of a tool, whose packages are installed if they are not those of `REQUIREMENTS`."""
    place, wanted = folder / tool, "\n".join(REQUIREMENTS[tool])
    marker = place / "requirements.txt"
    python = place / "bin" / "python"
    if not marker.is_file() or marker.read_text() != wanted:
        print(f"installing {', '.join(REQUIREMENTS[tool])} into {place}", file=sys.stderr, flush=True)
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-U", "pip"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS[tool]], check=True)
        marker.write_text(wanted)
    return python


def prepare(out: Path, names: Iterable[str], changes: list[str]) -> tuple[str, dict[str, Texts]]:
    """The model's folder and, by format, its recipe's rows and the held-out ones."""
    import torch
    from safetensors.torch import save_file

    from qat.checkpoints.hf import load_model, load_tokenizer, resolve
    from qat.trainers.data import DataConfig, load_blocks
    from qat.trainers.job import load_job

    made: dict[str, Texts] = {}
    for name in names:
        job = load_job(ROOT / "configs" / RECIPES[name], changes)
        folder = resolve(job.model)
        tokenizer, teacher = load_tokenizer(folder), load_model(folder, torch.float32).eval()
        calibration = job.calibration or job.data
        wanted = {
            "train": (job.data, job.steps * job.rows * job.data.seq_len),
            "calibration": (calibration, job.calibration_rows * calibration.seq_len),
            **{text: (DataConfig(source=text), job.eval.tokens) for text in HELDOUT},
        }
        tensors, digests = {}, {}
        for text, (config, tokens) in wanted.items():
            blocks = load_blocks(config, tokenizer, num_tokens=tokens, teacher=teacher)
            batch = blocks.rows(list(range(len(blocks))))
            tensors |= {f"{text}.{key}": batch[key] for key in ("input_ids", "position_ids", "targets")}
            digests[text] = blocks.digest
        made[name] = Texts(out / f"texts-{name}.safetensors", digests)
        save_file(tensors, made[name].path)
    return str(folder), made


def measured(cell: Cell, model: str, texts: Texts, arguments: argparse.Namespace) -> dict[str, Any]:
    """The cell's result, from its file if it was run before with the same settings."""
    from qat.numbers.catalog import lookup

    out: Path = arguments.out
    read = {cell.text, *(["train"] if "lr" in cell.settings else []), *HELDOUT}
    asked = {
        **asdict(cell), "model": model, "texts": str(texts.path), "group": lookup(cell.format).group, "seed": 0,
        "digests": {name: digest for name, digest in texts.digests.items() if name in read},
    }  # fmt: skip
    request, answer, log = (out / f"{cell.name}{end}" for end in (".cell.json", ".json", ".log"))
    if not (answer.is_file() and request.is_file() and json.loads(request.read_text()) == asked):
        answer.unlink(missing_ok=True)
        request.write_text(json.dumps(asked, indent=1))
        given = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        given.pop("PYTHONPATH", None)
        if arguments.threads:
            given["OMP_NUM_THREADS"] = str(arguments.threads)
        python = environment(cell.tool, arguments.environments)
        with log.open("w") as file:
            code = subprocess.run([python, WORKER, request, answer], env=given, stdout=file, stderr=file).returncode
        if not answer.is_file():  # killed: not kept, so it is run again
            last = log.read_text(errors="replace").strip().splitlines() or [""]
            error = f"exit status {code}: {last[-1][:200]}"
            return checked(cell, {"error": error, "versions": {}})
    return checked(cell, json.loads(answer.read_text()))


def checked(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """The result, an error if the model did not multiply what the format can hold."""
    version = result["versions"].get(DISTRIBUTIONS.get(cell.tool, cell.tool), "")
    row = {**asdict(cell), **result, "label": f"{cell.tool} {version}".strip()}
    if "error" not in result:
        weights, inputs = result["four_bit_weights"], result["four_bit_inputs"]
        if not weights or (cell.format != "int4_g64" and inputs != weights):
            row["error"] = f"{weights} products with four-bit weights and {inputs} with four-bit inputs"
    return row


def ours(run: Path, heldout: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a finished run: RTN, initialisation, trained student; judged by our evaluator on the same rows."""
    report = json.loads((run / "report.json").read_text())
    text = heldout.get(report["eval_hash"])
    if text is None:
        raise SystemExit(
            f"{run} was judged on other rows than these ({report['eval_hash'][:12]}): run its recipe again"
        )
    names = {entry["weight"] for entry in report["scheme"]} & RECIPES.keys()
    for row in report["rows"]:
        if row["name"] != "bf16" and len(names) == 1:
            yield {
                "tool": "ours", "label": f"ours ({run.name})", "format": next(iter(names)), "method": row["name"],
                "text": "", "seconds": report["seconds"] if row["name"] == "student" else None,
                "passes": report["tokens"] if row["name"] == "student" else None,
                "scores": {text: {key: row[key] for key in ("kl", "nll", "top1", "tokens")}},
            }  # fmt: skip


def trained(name: str, out: Path, changes: list[str]) -> Path:
    """The folder of a run of the shipped recipe, which is run if it is not there."""
    from qat.checkpoints.resume import has_state
    from qat.kernels.load import load_for_training
    from qat.trainers.job import load_job
    from qat.trainers.run import train

    job = load_job(ROOT / "configs" / RECIPES[name], ["precision=bf16-mixed", *changes, f"runs={out / 'ours'}"])
    if not (job.folder / "report.json").is_file():
        load_for_training()
        train(job, resume_run=has_state(job.folder), table=False)
    return job.folder


def table(rows: list[dict[str, Any]], name: str) -> list[str]:
    """One format's rows as Markdown, the best KL first, errors last."""
    from qat.numbers.catalog import lookup

    mine = [row for row in rows if row["format"] == name]
    text = next((t for t in HELDOUT if any(t in row.get("scores", {}) for row in mine)), HELDOUT[-1])
    good = [row for row in mine if "error" not in row and text in row["scores"]]
    plain = next((row["scores"][text]["kl"] for row in good if row["tool"] == "ours" and row["method"] == "ptq"), None)
    bits = lookup(name).bits_per_weight(1536, 576)
    lines = [
        f"### {name}, {bits:.2f} bits per weight, judged on {text}",
        "",
        "| tool | method | text | passes | seconds (of CPU) | KL | NLL | top-1 | KL gap closed |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(good, key=lambda row: float(row["scores"][text]["kl"])):
        score = row["scores"][text]
        closed = "" if not plain else f"{1 - score['kl'] / plain:.1%}"
        seconds = "" if row.get("seconds") is None else f"{row['seconds']:,.0f}"
        seconds += f" ({row['cpu_seconds']:,.0f})" if "cpu_seconds" in row else ""
        passes = "" if row.get("passes") is None else f"{row['passes']:,}"
        lines.append(
            f"| {row['label']} | {row['method']} | {row['text']} | {passes} | {seconds} | {score['kl']:.4f} "
            f"| {score['nll']:.4f} | {score['top1']:.1%} | {closed} |"
        )
    lines += [
        f"| {r['label']} | {r['method']} | {r['text']} | {r['error'].replace('|', '/')} | | | | | |"
        for r in mine
        if "error" in r
    ]
    return [*lines, ""]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", type=Path, help="finished runs of ours; nothing behind it leaves ours out")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="in our recipes; steps=1: starts alone")
    parser.add_argument("--tools", nargs="+", choices=REQUIREMENTS, default=list(REQUIREMENTS))
    parser.add_argument("--formats", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells whose names match one")
    parser.add_argument("--threads", type=int, default=0, help="of each cell (default: as many as there are)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "peers")
    parser.add_argument("--environments", type=Path, default=ROOT / ".versions" / "peers")
    parser.add_argument("--table", action="store_true", help="only from the cells that are there")
    return parser.parse_args()


def wanted(cell: Cell, arguments: argparse.Namespace) -> bool:
    """Whether the command line asks for a cell."""
    if arguments.table and not (arguments.out / f"{cell.name}.json").is_file():
        return False
    named = any(fnmatchcase(cell.name, pattern) for pattern in arguments.only)
    return named and cell.tool in arguments.tools and cell.format in arguments.formats


def main() -> None:
    """Run what is missing; print the tables and write them to --out."""
    arguments = options()
    from qat.checkpoints.progress import counted
    from qat.trainers.job import load_job

    arguments.out.mkdir(parents=True, exist_ok=True)
    model, texts = prepare(arguments.out, arguments.formats, arguments.set)
    rates = {name: load_job(ROOT / "configs" / recipe, []).optim.lr for name, recipe in RECIPES.items()}
    chosen = [cell for cell in cells(rates) if wanted(cell, arguments)]
    heldout = {one.digests[text]: text for one in texts.values() for text in HELDOUT}
    runs = arguments.run
    if runs is None:
        runs = [trained(name, arguments.out, arguments.set) for name in arguments.formats]
    rows = [row for run in runs for row in ours(run, heldout)]
    for cell in counted(chosen, "peers", len(chosen), "cells"):
        rows.append(measured(cell, model, texts[cell.format], arguments))
        last = rows[-1]
        said = last.get("error") or {t: round(s["kl"], 4) for t, s in last["scores"].items()}
        print(f"{cell.name}: {said}", file=sys.stderr, flush=True)
    (arguments.out / "peers.json").write_text(json.dumps(rows, indent=1))
    page = "\n".join(line for name in arguments.formats for line in table(rows, name))
    (arguments.out / "peers.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
