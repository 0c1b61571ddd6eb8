"""Host memory of loading, quantizing and exporting a model of an 8B model's layers, per layer and beyond the layers.

A random BF16 model is written in shards, and each case runs in a process of its own, for two numbers of layers. Figures
are growths of the peak over the state before. "Own" is anonymous memory, which only this process has and which must
stay; "mapped" are pages of the model's files, which all processes of a machine share and the system takes back.

    python benchmarks/host_memory.py [--layers 2 4] [--hidden 4096] [--ffn 14336] [--vocabulary 1024] [--json]
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD_BYTES = 500_000_000
FIELDS = {"own": "RssAnon", "mapped": "RssFile"}
WHOLE = (32, 128_256)  # layers and vocabulary of the 8B model


def resident() -> dict[str, int]:
    """Bytes that this process has in memory, by kind."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", status))
    return {name: 1024 * int(sizes[field]) for name, field in FIELDS.items()}


@contextlib.contextmanager
def watched(found: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Note under `name` how far memory rises in the block, read every two milliseconds, and where it is at the end."""
    before, peak, over = resident(), resident(), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for key, value in resident().items():
                peak[key] = max(peak[key], value)

    thread, began = threading.Thread(target=watch, daemon=True), time.perf_counter()
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        after = resident()
        found[name] = {key: max(peak[key], after[key]) - before[key] for key in peak}
        found[name] |= {f"{key} after": after[key] - before[key] for key in after}
        found[name]["seconds"] = time.perf_counter() - began


def build(folder: Path, layers: int, sizes: argparse.Namespace) -> None:
    """A random model, tensor by tensor."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qat.checkpoints.shards import ShardWriter

    config: Any = AutoConfig.for_model(
        "llama",
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=layers,
        num_attention_heads=sizes.hidden // 128,
        num_key_value_heads=max(sizes.hidden // 512, 1),
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    values = (0.02 * torch.randn(1 << 20)).to(torch.bfloat16)
    with ShardWriter(folder, SHARD_BYTES) as writer:
        for name, tensor in model.state_dict().items():
            count = tensor.numel()
            writer.add(name, values.repeat(-(-count // len(values)))[:count].view(tensor.shape))
        config.save_pretrained(writer.folder)


def measure(folder: Path, case: str) -> dict[str, dict[str, float]]:
    """The phases of one case, in this process."""
    import torch

    from qat.checkpoints.export import export_model
    from qat.checkpoints.hf import load_model
    from qat.scheme import Scheme
    from qat.surgery import apply

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:  # what the first use imports is no model's
        tiny = Path(name) / "tiny"
        build(tiny, 1, argparse.Namespace(hidden=128, ffn=256, vocabulary=256))
        found = _phases(tiny, case, Path(name) / "out", load_model, export_model, apply, Scheme)
        found = _phases(folder, case, Path(name) / "real", load_model, export_model, apply, Scheme)
    return found


def _phases(
    folder: Path, case: str, out: Path, load_model: Any, export_model: Any, apply: Any, scheme: Any
) -> dict[str, dict[str, float]]:
    import torch

    found: dict[str, dict[str, float]] = {}
    if case == "bfloat16":
        with watched(found, "load as BF16"):
            model = load_model(folder, torch.bfloat16)
        return found
    rules = [{"match": "model.embed_tokens", "skip": "the table"}, {"match": "*", "weight": "nvfp4", "input": None}]
    with watched(found, "load as float32"):
        model = load_model(folder)
    found["model"] = {"own": sum(parameter.nbytes for parameter in model.parameters())}
    found["largest matrix"] = {"own": max(parameter.nbytes for parameter in model.parameters())}
    with watched(found, "quantize (nvfp4, Dual-LSQ)"):
        apply(model, scheme.model_validate({"rules": rules, "init": []}), defer_init=True)
    with watched(found, "export"):
        export_model(model, folder, out)
    return found


def run(folder: Path, case: str) -> dict[str, dict[str, float]]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return measured


def table(few: dict[str, dict[str, float]], many: dict[str, dict[str, float]], layers: list[int]) -> Iterator[str]:
    """Markdown, in MB: what grows with layers, what does not, and both for the whole model's layers."""
    yield f"| phase | own, per layer | beyond layers | {WHOLE[0]} layers | mapped, per layer | seconds at {layers[1]} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for phase in few:
        slopes = {k: (many[phase].get(k, 0) - few[phase].get(k, 0)) / (layers[1] - layers[0]) / 1e6 for k in FIELDS}
        fixed = few[phase]["own"] / 1e6 - layers[0] * slopes["own"]
        yield (
            f"| {phase} | {slopes['own']:,.0f} | {fixed:,.0f} | {fixed + WHOLE[0] * slopes['own']:,.0f} "
            f"| {slopes['mapped']:,.0f} | {many[phase].get('seconds', 0):,.1f} |"
        )


def main() -> None:
    """Measure every case at two depths and print the table, or the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="two numbers for the table")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="raw bytes by number of layers")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.folder, arguments.case)))
        return
    found: list[dict[str, dict[str, float]]] = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            build(folder, layers, arguments)
            found.append(run(folder, "float32") | run(folder, "bfloat16"))
    if arguments.json:
        print(json.dumps(dict(zip(map(str, arguments.layers), found, strict=True))))
        return
    print("\n".join(table(*found, layers=arguments.layers)))


if __name__ == "__main__":
    main()
