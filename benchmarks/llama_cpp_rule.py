"""What llama.cpp itself makes of a model: weights under its own rules, as a plain folder that `qat eval` reads.

The default types are those of its Q4_K files without an importance matrix, pure, where 256 divides no row but
down_proj's: Q5_0 stands in for Q4_K, Q8_0 for Q6_K. Rounding is done by ggml's own library, which llama-cpp-python
brings (`make test-llama-cpp` compiles it), read back by the `gguf` package.

    python benchmarks/llama_cpp_rule.py runs/naive-q4_k
    qat eval runs/naive-q4_k --teacher embedded:smollm2-135m --text heldout/reporting
"""

import argparse
import ctypes
import fnmatch
import shutil
import sys
from pathlib import Path

LIBRARIES = ".llama-cpp/lib/python*/site-packages/llama_cpp/lib/libggml-base.so"
TYPES = ("*.down_proj.weight=Q4_K", "*_proj.weight=Q5_0", "*.embed_tokens.weight=Q8_0")


def main() -> None:
    """Write the folder and say how much each type lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded:smollm2-135m", help="folder or id (default: %(default)s)")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="NAME=TYPE", help="first match wins (%(default)s)")
    parser.add_argument("--library", type=Path, help=f"libggml-base.so (default: {LIBRARIES})")
    arguments = parser.parse_args()
    found = [arguments.library] if arguments.library else sorted(Path().glob(LIBRARIES))
    if not found:
        sys.exit(f"there is no {LIBRARIES}; run make test-llama-cpp, or give --library")
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
    from safetensors.torch import load_file, save_file

    from qat.checkpoints.hf import ModelConfig, resolve

    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t

    def rounded(weight: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
        rows, columns = weight.shape
        block, size = GGML_QUANT_SIZES[kind]
        if columns % block:
            sys.exit(f"{kind.name} has blocks of {block}, which do not divide rows of {columns}")
        values, raw = weight.float().contiguous(), torch.empty(rows, columns // block * size, dtype=torch.uint8)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, raw))
        numbers = (ctypes.c_int64(number) for number in (0, rows, columns))
        ggml.ggml_quantize_chunk(ctypes.c_int(kind), *pointers, *numbers, None)
        return torch.from_numpy(dequantize(raw.numpy(), kind)).reshape(weight.shape)

    source = resolve(ModelConfig(id=arguments.model))
    shutil.copytree(source, arguments.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".qat-*"))
    rules = [rule.rpartition("=") for rule in arguments.types]
    lost: dict[str, list[float]] = {}
    for file in sorted(arguments.out.glob("*.safetensors")):
        tensors = load_file(file)
        for name, weight in tensors.items():
            kind = next((kind for pattern, _, kind in rules if fnmatch.fnmatch(name, pattern)), None)
            if kind is not None and weight.dim() == 2:
                value = rounded(weight, GGMLQuantizationType[kind])
                noise, signal = ((t.double().square().sum()) for t in (value - weight.float(), weight))
                lost.setdefault(kind, []).append(float(-10 * torch.log10(noise / signal)))
                tensors[name] = value
        save_file(tensors, file, {"format": "pt"})
    for kind, every in lost.items():
        print(f"{kind}: {len(every)} tensors, {sum(every) / len(every):.2f} dB on average")


if __name__ == "__main__":
    main()
