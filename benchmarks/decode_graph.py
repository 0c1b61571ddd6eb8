"""Tokens per second of one request, decoded as `qat serve` does: steps recorded as CUDA graphs, and without.

A Llama of 8B's shape with random weights, made on the device: in BF16, then with its linear layers packed. Of each the
time of a replayed step by itself, `generate` with graphs, and `generate` without them on the same kind of cache, whose
tokens must be the same. Each result is a line of JSON, written as it comes.

    python3 benchmarks/decode_graph.py [--layers 32] [--tokens 96] [--formats int4_g128 nvfp4] [--device cuda]
        [--head int8_channel] [--seconds 60] [--out FOLDER]

Norms are fused and layers that read the same input stacked, as the engine does; one row has layers apart, one an 8-bit
head. BF16 is measured as transformers has it, which is what the others are compared with, and with fused norms.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402  # after the path
from torch import nn  # noqa: E402  # as above
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402  # as above

from qat.engines.graphs import Decoding  # noqa: E402  # as above
from qat.engines.norms import fuse_norms  # noqa: E402  # as above
from qat.engines.stacks import stack_readers  # noqa: E402  # as above
from qat.families import find_family, fused_sets  # noqa: E402  # as above
from qat.kernels.load import load  # noqa: E402  # as above
from qat.numbers.catalog import lookup  # noqa: E402  # as above
from qat.numbers.numerics import quantize  # noqa: E402  # as above
from qat.serving.packed import PackedLinear, pack  # noqa: E402  # as above

PROMPT, REPLAYS, PLAIN = 16, 30, 24  # tokens of the prompt, replays, and tokens without graphs
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "vocab_size": 128256, "max_position_embeddings": 8192}  # fmt: skip
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 512, "max_position_embeddings": 512}  # fmt: skip


def made(device: str, layers: int) -> Any:
    """The model in BF16."""
    shape: dict[str, Any] = LLAMA if device == "cuda" else SMALL
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(num_hidden_layers=layers, **shape), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """By path, without the head."""
    return {path: layer for path, layer in model.model.named_modules(prefix="model") if isinstance(layer, nn.Linear)}


def packed(layer: nn.Linear, format: str) -> PackedLinear:
    """The same layer, its weight rounded to nearest."""
    return PackedLinear(pack(quantize(layer.weight.detach(), lookup(format)))).eval()


def generated(model: Any, tokens: int, cache: Any) -> tuple[torch.Tensor, float]:
    """What follows a fixed prompt, and seconds."""
    ids = torch.arange(PROMPT, device=model.device)[None] + 100
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    _wait(model)
    began = time.perf_counter()
    text = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, disable_compile=True, **settings
    )
    _wait(model)
    return text[0, PROMPT:], time.perf_counter() - began


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def step_us(decoding: Decoding) -> float | None:
    """A replayed step by itself, on the device, or None where none was recorded."""
    step: Any = next(iter(decoding._steps.values()), None)
    if step is None:
        return None
    decoding.cache(PROMPT + REPLAYS)  # empties it
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step._replay()
    begin.record()
    for _ in range(REPLAYS):
        step._replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / REPLAYS


def measured(model: Any, tokens: int) -> dict[str, Any]:
    """Both ways of one model."""
    decoding = Decoding(model)
    room = PROMPT + tokens
    for few in (4, tokens):  # compiles and records first
        text, graph = generated(model, few, decoding.cache(room))
    row: dict[str, Any] = {"graph_tokens_per_s": tokens / graph, "step_us": step_us(decoding)}
    row["recorded"] = len(decoding._steps)
    vars(model).pop("forward", None)  # from here on, its own
    plain, eager = generated(model, PLAIN, decoding.cache(room))
    return row | {"plain_tokens_per_s": PLAIN / eager, "same_tokens": bool(torch.equal(text[:PLAIN], plain))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help=f"at least {PLAIN} (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="begin no model after these (default: %(default)s)")
    parser.add_argument("--formats", nargs="*", default=["int4_g128", "nvfp4"])
    parser.add_argument("--head", default="int8_channel", help="format of the head in one more row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for decode.jsonl")
    arguments = parser.parse_args()
    if arguments.device not in load():
        print(f"no kernels for {arguments.device} here: packed layers run their reference")
    os.environ["QAT_CUDA_GRAPHS"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model = made(arguments.device, arguments.layers)
    dense, head = linear_layers(model), model.lm_head
    kinds = [
        ("bfloat16", None, None, False),
        ("bfloat16, norms fused", None, None, False),
        *((name, name, None, True) for name in arguments.formats),
    ]
    if arguments.formats:
        first = arguments.formats[0]
        kinds[3:3] = [(f"{first}, head {arguments.head}", first, arguments.head, True),
                      (f"{first}, layers apart", first, None, False)]  # fmt: skip
    base, failed = None, 0
    with torch.no_grad(), (arguments.out / "decode.jsonl").open("w") as file:
        for what, format, own_head, stacked in kinds:
            if time.perf_counter() - began > arguments.seconds:
                print(f"{arguments.seconds:g} s are over: the rest, from {what} on, is not timed")
                break
            try:
                for path, layer in dense.items():
                    model.set_submodule(path, layer if format is None else packed(layer, format))
                model.set_submodule("lm_head", head if own_head is None else packed(head, own_head))
                if what != kinds[0][0]:
                    fuse_norms(model)
                if stacked:
                    stack_readers(model, fused_sets(dense, find_family("llama").fused))
                row: dict[str, Any] = {"what": what, "layers": arguments.layers, **measured(model, arguments.tokens)}
                base = base or row["graph_tokens_per_s"]
                row["of_bfloat16"] = row["graph_tokens_per_s"] / base
                failed += not row["same_tokens"]
            except Exception as error:  # the next may run
                row, failed = {"what": what, "error": f"{type(error).__name__}: {str(error)[-500:]}"}, failed + 1
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
            vars(model).pop("forward", None)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
