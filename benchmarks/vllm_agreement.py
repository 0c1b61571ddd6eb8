"""Whether vLLM, alone and with our plugin, computes what an export says: greedy tokens and their log-probabilities
against our own reading of the same files, as a markdown table.

vLLM answers three prompts greedily in BF16, once without plugins and once with ours; our packed reading under
transformers (BF16) then scores the same tokens: how many it would write itself, and how far the log-probabilities are
apart. The floor is both figures for that reading in float32 against itself in BF16.

    python benchmarks/vllm_agreement.py EXPORT [EXPORT ...] --vllm-python .venv-vllm/bin/python

The interpreter that runs this needs qat; the other needs vLLM and qat (`make test-vllm` sets it up).
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Water boils at a temperature of")
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
Answers = list[dict[str, Any]]


def answer(folder: str, tokens: int) -> dict[str, Any]:
    """Runs inside vLLM's interpreter: schemes of the layers, and token ids with log-probabilities; or vLLM's error."""
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(folder, enforce_eager=True, dtype="bfloat16", max_model_len=256, kv_cache_memory_bytes=64 << 20)
        schemes = llm.apply_model(
            lambda model: Counter(type(m.scheme).__name__ for m in model.modules() if getattr(m, "scheme", None))
        )[0]
        wanted = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)
        rows = []
        for output in llm.generate(list(PROMPTS), wanted, use_tqdm=False):
            best = output.outputs[0]
            logprobs = [step[token].logprob for token, step in zip(best.token_ids, best.logprobs, strict=True)]
            rows.append({"prompt": list(output.prompt_token_ids), "tokens": list(best.token_ids), "logprobs": logprobs})
        return {"rows": rows, "schemes": sorted(schemes)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()


def ask_vllm(python: str, folders: list[Path], tokens: int, plugin: bool) -> Answers:
    """`answer` for every folder, in one process of the other interpreter."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.json"
        command = [python, __file__, *map(str, folders), "--tokens", str(tokens), "--answer", str(out)]
        env = {**os.environ, **QUIET, **({} if plugin else {"VLLM_PLUGINS": ""})}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if not out.is_file():
            raise SystemExit(f"{python} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        answers: Answers = json.loads(out.read_text(encoding="utf-8"))
        return answers


@torch.inference_mode()
def score(model: Any, rows: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens that vLLM wrote: their log-probabilities, and the tokens that the model would write there."""
    logprobs, own = [], []
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["tokens"]])
        logits = model(input_ids=ids).logits[0, len(row["prompt"]) - 1 : -1].float()
        own.append(logits.argmax(-1))
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(row["tokens"])[:, None])[:, 0])
    return torch.cat(logprobs), torch.cat(own)


def compare(folder: Path, alone: dict[str, Any], plugin: dict[str, Any]) -> str:
    """Two lines of the table."""
    from qat.engines.transformers import load_packed

    models = [load_packed(folder, dtype) for dtype in (torch.bfloat16, torch.float32)]
    lines = []
    for name, found in (("alone", alone), ("with qat", plugin)):
        if "error" in found:
            problem = found["error"].splitlines()[0].partition(" Reasons")[0]
            lines.append(f"| {folder.name} | {name} | {problem[:110]} | | | |")
            continue
        (ours, own), (exact, best) = (score(model, found["rows"]) for model in models)
        theirs = torch.tensor([value for row in found["rows"] for value in row["logprobs"]])
        tokens = torch.tensor([token for row in found["rows"] for token in row["tokens"]])
        by = ", ".join(scheme.removeprefix("CompressedTensors") for scheme in found["schemes"])
        same, floor = int((own == tokens).sum()), int((own == best).sum())
        lines.append(
            f"| {folder.name} | {name} | {by} | {same} / {len(tokens)} | {_gap(theirs, ours)} | "
            f"{floor} / {len(tokens)}, {_gap(ours, exact)} |"
        )
    return "\n".join(lines)


def _gap(one: torch.Tensor, other: torch.Tensor) -> str:
    difference = (one - other).abs()
    return f"{float(difference.mean()):.4f} / {float(difference.max()):.3f}"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--vllm-python", default=os.environ.get("QAT_VLLM_PYTHON", sys.executable))
    parser.add_argument("--tokens", type=int, default=24, help="to write per prompt")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer is not None:
        answers = [answer(str(folder), given.tokens) for folder in given.folders]
        given.answer.write_text(json.dumps(answers), encoding="utf-8")
        return
    alone, plugin = (ask_vllm(given.vllm_python, given.folders, given.tokens, ours) for ours in (False, True))
    print("| export | vLLM | served by | tokens on which our reading agrees | mean / max difference | floor |")
    print("|---|---|---|---|---|---|")
    for folder, one, other in zip(given.folders, alone, plugin, strict=True):
        print(compare(folder, one, other), flush=True)


if __name__ == "__main__":
    main()
