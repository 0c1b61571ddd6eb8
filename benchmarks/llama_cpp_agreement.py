"""Does llama.cpp name the same most likely token as our reading of a GGUF file? With every tensor as the `gguf` package
dequantizes it, in float32, so that nothing but names, order and settings can differ; on the shipped held-out prose.

    make test-llama-cpp                     # compiles llama.cpp into .llama-cpp
    python benchmarks/llama_cpp_agreement.py FILE.gguf [--positions 8192] [--python .llama-cpp/bin/python]
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from qat.checkpoints.hf import ModelConfig, load_tokenizer, resolve
from qat.checkpoints.layouts.gguf.load import load_file
from qat.checkpoints.progress import progress
from tests.engines.test_llama_cpp import in_float32

ROOT = Path(__file__).parents[1]
TEXT, SCRIPT = ROOT / "trainers" / "text" / "heldout.txt", ROOT / "tests" / "engines" / "llama_cpp_logits.py"
ROW, AT_ONCE = 512, 2  # tokens of a row, and rows whose logits are held


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument(
        "--python", type=Path, default=ROOT / ".llama-cpp" / "bin" / "python", help="that has llama_cpp"
    )
    arguments = parser.parse_args()
    ids = load_tokenizer(resolve(ModelConfig(id=str(arguments.file))))(TEXT.read_text())["input_ids"]
    count = min(arguments.positions, len(ids)) // ROW
    rows = torch.tensor(ids[: count * ROW]).view(count, ROW)
    model, same, apart = load_file(arguments.file), 0, 0.0
    with tempfile.TemporaryDirectory() as folder, progress("positions", rows.numel()) as advance, torch.no_grad():
        scratch = Path(folder)
        plain = in_float32(arguments.file, scratch / "plain.gguf")
        for part in rows.split(AT_ONCE):
            np.save(scratch / "ids.npy", part.numpy())
            command = [arguments.python, SCRIPT, scratch / "ids.npy", scratch, plain]
            subprocess.run([str(each) for each in command], check=True, capture_output=True)
            theirs = torch.from_numpy(np.load(scratch / "plain.npy")).log_softmax(-1)
            ours = model(part).logits.float().log_softmax(-1)
            best = theirs.argmax(-1, keepdim=True)
            same += int((ours.argmax(-1, keepdim=True) == best).sum())
            apart += float((ours.gather(-1, best) - theirs.gather(-1, best)).abs().sum())
            advance(part.numel())
    count = rows.numel()
    print(f"{same} of {count} positions name the same token; log-probabilities differ by {apart / count:.1e}")


if __name__ == "__main__":
    main()
