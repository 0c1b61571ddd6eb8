"""Tokens per second of greedy `generate` in one process: exports with packed weights against BF16, taking turns.

    python benchmarks/generate.py BF16_MODEL EXPORT [EXPORT ...] [--rounds 5] [--tokens 32] [--prompt 512]

With `--prompt N` the prompt has N tokens and only the first token after it is timed, in milliseconds.

`embedded` stands for the embedded SmolLM2-135M. The first folder is what the others are compared with. The first round
is dropped. Ratios are medians over the rounds: within a round the machine is the same.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

PROMPT = "The sea is a large body of salt water that"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, help="tokens of the prompt, of which the first token is timed")
    arguments = parser.parse_args()
    from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, read_json, resolve
    from qat.engines.transformers import compute_dtype, load_packed

    models = {}
    for given in arguments.folders:
        folder = resolve(ModelConfig(id="embedded:smollm2-135m")) if given == "embedded" else Path(given)
        packed = "quantization_config" in read_json(folder / "config.json")
        dtype = compute_dtype("cpu")
        plain = "embedded model" if given == "embedded" else folder.name
        name = folder.name if packed else f"{plain}, {str(dtype).removeprefix('torch.')}"
        models[name] = load_packed(folder) if packed else load_model(folder, dtype).eval()
        ids = load_tokenizer(folder)(PROMPT, return_tensors="pt")["input_ids"]
    if arguments.prompt:
        ids, arguments.tokens = ids.repeat(1, -(-arguments.prompt // ids.shape[1]))[:, : arguments.prompt], 1
    speeds: dict[str, list[float]] = {name: [] for name in models}
    options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    with torch.inference_mode():
        for index in range(arguments.rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                model.generate(ids, pad_token_id=0, **options)
                if index:
                    speeds[name].append(arguments.tokens / (time.perf_counter() - began))
    base = next(iter(speeds.values()))
    for name, own in speeds.items():
        ratio, speed = statistics.median(a / b for a, b in zip(own, base, strict=True)), statistics.median(own)
        told = f"{1000 / speed:>8.0f} ms" if arguments.prompt else f"{speed:>8.1f} tokens/s"
        print(f"{name:<34}{told}{ratio:>8.2f}x")


if __name__ == "__main__":
    main()
