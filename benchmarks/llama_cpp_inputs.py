"""What llama.cpp's rounding of inputs costs: KL and most likely tokens of a GGUF file, read with inputs as they
come, and rounded as llama.cpp does before super-blocks and before all weights, on the shipped held-out prose.

    python benchmarks/llama_cpp_inputs.py FILE.gguf [--teacher embedded:smollm2-135m] [--positions 1024]
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, resolve
from qat.checkpoints.layouts.gguf.load import load_file, parts
from qat.checkpoints.layouts.gguf.read import GgufFile
from qat.checkpoints.layouts.gguf.types import FORMATS

TEXT = Path(__file__).parents[1] / "trainers" / "text" / "heldout.txt"
ROW = 256  # tokens of a row


def rounding(file: Path, which: str) -> nn.Module:
    """The file's model with float32 inputs but before `which` weights: "none", "super-blocks" or "all"."""
    model, opened = load_file(file, inputs=which != "none"), GgufFile(file)
    assert opened.record is not None
    kinds = {name: FORMATS.get(opened.stored(e["tensor"]).tensor_type) for name, e in parts(opened.record).items()}
    for name, module in model.named_modules():
        fmt = kinds.get(f"{name}.weight")
        if which == "super-blocks" and not (fmt is not None and fmt.super_block):
            module._forward_pre_hooks.clear()
    return model


def main() -> None:
    """Print one line for each way to read the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--teacher", default="embedded:smollm2-135m", help="folder or id (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=1024)
    arguments = parser.parse_args()
    source = resolve(ModelConfig(id=arguments.teacher))
    ids = load_tokenizer(source)(TEXT.read_text())["input_ids"]
    rows = torch.tensor(ids[: arguments.positions // ROW * ROW]).view(-1, ROW)

    def probabilities(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(row[None]).logits.float().log_softmax(-1) for row in rows]).flatten(0, 1)

    teacher = probabilities(load_model(source, torch.float32).eval())
    own = None
    for which in ("none", "super-blocks", "all"):
        found = probabilities(rounding(arguments.file, which))
        own = found if own is None else own
        said = [f"inputs rounded before {which}"]
        for what, of in (("the teacher", teacher), ("unrounded inputs", own)):
            pairs = list(zip(of, found, strict=True))
            apart = sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / len(pairs)
            same = sum(int(a.argmax()) == int(b.argmax()) for a, b in pairs) / len(pairs)
            said.append(f"to {what} KL {apart:.4f}, same token {same:.1%}")
        print(*said, sep="; ", flush=True)


if __name__ == "__main__":
    main()
