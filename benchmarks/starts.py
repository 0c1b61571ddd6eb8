"""What an initialisation is worth before any training: held-out KL of the embedded model for several ways to begin.

Each is calibrated on the same text, which the teacher writes, and evaluated on the same held-out text.

    python benchmarks/starts.py [--formats nvfp4 mxfp4] [--tokens 4096] [--rows 24]
"""

import argparse
import time
from typing import Any

STARTS: dict[str, dict[str, Any]] = {
    "RTN": {"init": ()},
    "input-weighted scales": {},
    "+ GPTQ": {"init": ("gptq",)},
    "+ smoothing": {"init": ("smooth", "scales")},
    "+ smoothing + GPTQ": {"init": ("smooth", "gptq")},
}


def main() -> None:
    """Measure and print a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "mxfp4"], help="of weights and inputs")
    parser.add_argument("--tokens", type=int, default=4096, help="of held-out text (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=24, help="of 512 tokens to calibrate on (default: %(default)s)")
    arguments = parser.parse_args()
    from qat.trainers.memory import keep_freed_blocks

    keep_freed_blocks()
    import torch

    from qat import Rule, Scheme, apply, calibrate
    from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, resolve
    from qat.trainers.data import Batches, DataConfig, load_blocks
    from qat.trainers.evaluate import Evaluator
    from qat.trainers.packing import model_inputs
    from qat.trainers.selfwritten import Generate

    source = resolve(ModelConfig(id="embedded:smollm2-135m"))
    tokenizer, teacher = load_tokenizer(source), load_model(source, torch.float32).eval()
    heldout = load_blocks(DataConfig(source="heldout"), tokenizer, num_tokens=arguments.tokens)
    evaluator = Evaluator(teacher, heldout, 2, torch.device("cpu"), torch.bfloat16)
    own = DataConfig(source="teacher", generate=Generate(batch=24))
    written = load_blocks(own, tokenizer, num_tokens=arguments.rows * 512, teacher=teacher)
    batches = Batches(written, 2, 0)
    text = [model_inputs(batches.batch(index)) for index in range(arguments.rows // 2)]
    print("| weights and inputs | " + " | ".join(STARTS) + " |")
    print("|---" * (len(STARTS) + 1) + "|")
    for name in arguments.formats:
        cells = []
        for changes in STARTS.values():
            began = time.perf_counter()
            rules = (
                Rule(match="lm_head", skip="tied"),
                Rule(match="model.embed_tokens", skip="tied"),
                Rule(match="*_proj", weight=name, input=name),
            )
            scheme = Scheme(rules=rules, **changes)
            student = apply(load_model(source, torch.float32), scheme, defer_init=True)
            with torch.autocast("cpu", torch.bfloat16):
                calibrate(student, text, scheme)
            cells.append(f"{evaluator.score(student).kl:.4f} ({time.perf_counter() - began:.0f} s)")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
