"""Run by test_transformers_engine.py under TRITON_INTERPRET=1 and QAT_KERNELS=0: tiny exports served by transformers
the way a GPU serves them, every operator by its Triton kernel, against the dense reading of the same files.

The tensors lie on the CPU, so this sees launches, layouts and shapes as the engine makes them, no GPU's arithmetic.
"""

import sys
from pathlib import Path

import torch

from qat.checkpoints.exported import load_exported
from qat.engines import transformers as engine
from qat.kernels.load import register
from qat.serving.matmul import QuantizedLinear, problem
from qat.serving.packed import PackedLinear
from tests.checkpoints.exports import ids
from tests.kernels.interpreted import mend

OPERATORS = {
    "packed_linear": "packed_linear/triton",
    "fake_quantize_input": "fake_quantize_input/triton",
    "quantize_input": "quantize_input/triton",
    "quantized_matmul": "quantized_matmul/triton",
}


def check(folder: Path) -> None:
    """Compare the logits of one token and of several, and count the layers of each kind."""
    served, dense = engine.load_packed(folder, torch.float32), load_exported(folder)
    kinds = [sum(isinstance(module, kind) for module in served.modules()) for kind in (PackedLinear, QuantizedLinear)]
    for tokens in (1, 5):
        with torch.inference_mode():
            found, expected = (model(input_ids=ids(tokens)).logits for model in (served, dense))
        # FP32 sums in another order, and codes of unrounded scales against weights rounded to BF16: a few inputs get
        # the neighbouring code. Twice the error seen; a wrong scale or axis gives .5 and more.
        error = float((found - expected).norm() / expected.norm())
        assert error <= 2**-5, f"{folder.name}: {tokens} tokens are off by {error}"
    print(f"{folder.name}: {kinds[0]} packed, {kinds[1]} multiplied by codes")


def main(folders: list[str]) -> None:
    """Serve one after the other."""
    mend()
    for operator, file in OPERATORS.items():
        register(operator, "cpu", file)
    engine.multiplies_codes = lambda input, weight: problem(input, weight.format) is None
    for folder in folders:
        check(Path(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
