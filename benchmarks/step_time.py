"""Step time and peak memory of quantization-aware training against the same model unquantized.

Same cross-entropy loss, same data, same optimizer, no teacher, fp32, on the embedded SmolLM2-135M. The two models
take turns step by step in one process, so that a drifting machine hits both; the ratio is that of the medians. Peak
memory is measured in a process of its own per model.

    python benchmarks/step_time.py [--steps 20] [--tokens 1024] [--device cuda] [--model llama-1b] [--json FILE]
    python benchmarks/step_time.py --model small --micro 4     # a step of four micro-batches: what `hold_weights` gains
    python benchmarks/step_time.py --device cuda --graphs      # passes as CUDA graphs: the device's time alone
    python benchmarks/step_time.py --model small --compile     # what graphs of blocks gain, as `compile: true`

On a GPU the kernels are loaded and the forward pass runs under BF16 autocast, as `qat train` does there.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

EVERY = 5  # steps between two refits, as in `optim.refit_every`
CASES = {
    "int4_g64 weight-only": ("int4_g64", None),
    "nvfp4 weight-only": ("nvfp4", None),
    "nvfp4 W4A4": ("nvfp4", "nvfp4"),
}


LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 4096, "tie_word_embeddings": True}  # fmt: skip
RANDOM = {"llama-1b": LLAMA_1B, "small": SMALL, "135m": {**SMALL, "num_hidden_layers": 30, "vocab_size": 49152}}


def load(name: str, device: str) -> Any:
    """The embedded model, or a random Llama: of a billion parameters, of the embedded model's shape, or of four of its
    blocks; in float32."""
    import torch

    from qat.checkpoints.hf import ModelConfig, load_model, resolve

    if name == "embedded":
        return load_model(resolve(ModelConfig(id="embedded:smollm2-135m")), torch.float32).to(device)
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**RANDOM[name]), dtype=torch.float32).to(device)


def build(weight: str | None, input: str | None, learn: str, name: str, device: str) -> tuple[Any, Any]:
    """The model (quantized, if a format is given) and its optimizer."""
    import torch

    from qat import Rule, Scheme, apply, calibrate
    from qat.trainers import optim

    model = load(name, device)
    if weight is not None:
        rules = (
            Rule(match="lm_head", skip="tied"),
            Rule(match="model.embed_tokens", skip="tied"),
            Rule(match="*_proj", weight=weight, input=input),
        )
        scheme = Scheme(rules=rules, init=(), learn=learn)
        apply(model, scheme)
        calibrate(model, [{"input_ids": torch.arange(64, device=device).view(1, -1)}], scheme)
    return model.train(), optim.build(model, optim.OptimConfig())


def loss_of(model: Any, ids: Any, tokens: int) -> Any:
    """The chunked cross-entropy loss of a micro-batch, its share of so many tokens."""
    import torch

    from qat.trainers.forward import Head
    from qat.training.losses import chunked
    from qat.training.objectives import CrossEntropy

    head, targets = Head(model.get_output_embeddings()), ids[:, 1:]
    every = torch.arange(targets.numel(), device=ids.device)  # no target is missing, which a GPU need not be asked
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return chunked(CrossEntropy(), hidden, head, None, None, targets, kept=every) / tokens


def recorded(model: Any, tokens: int) -> Any:
    """The passes of a model as CUDA graphs, as `cuda_graphs: true` has them."""
    from qat.trainers.cuda_graphs import Passes

    return Passes(lambda batch: loss_of(model, batch["input_ids"], tokens), model, print)


def step(model: Any, optimizer: Any, ids: Any, micro: int = 1, hold: bool = False, passes: Any = None) -> float:
    """Seconds of one optimizer step of so many micro-batches."""
    import contextlib

    import torch

    from qat.modes import held

    began = time.perf_counter()
    with held(model) if hold else contextlib.nullcontext():
        for index, part in enumerate(ids.chunk(micro, dim=1)):
            if passes is None:
                loss_of(model, part, ids[:, 1:].numel()).backward()
            else:
                assert passes({"input_ids": part}, index == 0) is not None
                passes.give()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def refit_seconds(model: Any, optimizer: Any, ids: Any) -> float:
    """Median seconds of refitting all scales once."""
    import torch

    from qat.trainers.after_step import AfterStep
    from qat.trainers.optim import OptimConfig

    after, times = AfterStep(model, OptimConfig(refit_every=1), 10**6), []
    for _ in range(4):
        began = time.perf_counter()
        after(1, optimizer)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def compare_held(how: tuple[str, str, str], options: argparse.Namespace, ids: Any) -> None:
    """Steps of several micro-batches, in turns: unquantized, quantized in each, quantized once; ratios of medians."""
    plain = build(None, None, *how)
    for name in options.case or list(CASES):
        quantized = build(*CASES[name], *how)
        sides = ((plain, False), (quantized, False), (quantized, True))
        times: list[list[float]] = [[], [], []]
        for index in range(options.steps + 2):
            for side, (pair, hold) in enumerate(sides):
                seconds = step(*pair, ids, options.micro, hold)
                if index >= 2:
                    times[side].append(seconds)
        dense, each, once = map(statistics.median, times)
        print(
            f"{name:<22} {options.micro} micro-batches: {each:.3f} s, {once:.3f} s held ({once / each:.3f}x); against "
            f"{dense:.3f} s plain {each / dense:.3f}x and {once / dense:.3f}x",
            flush=True,
        )


def compare_compiled(how: tuple[str, str, str], options: argparse.Namespace, ids: Any) -> None:
    """Steps of one quantized model, in turns with its blocks as they are and as graphs; ratios of medians."""
    import torch

    from qat.trainers.compile import Compiled, blocks_of, try_blocks

    for name in options.case or list(CASES):
        pair = build(*CASES[name], *how)
        of = Compiled(print)
        found = blocks_of(pair[0], "model", of)
        batch = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)}
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            try_blocks(pair[0], "model", found, batch)
        for block in found:
            block.put()
        seconds = time.perf_counter() - began
        times: tuple[list[float], list[float]] = ([], [])
        for index in range(options.steps + 2):
            for side in (0, 1):
                of.on = bool(side)
                taken = step(*pair, ids)
                if index >= 2:
                    times[side].append(taken)
        plain, graphed = map(statistics.median, times)
        reasons = {block.reason for block in found}
        print(
            f"{name:<22} {graphed:.3f} s against {plain:.3f} s: {graphed / plain:.3f}x; {seconds:.0f} s to compile "
            f"{len(found)} blocks{'' if reasons == {None} else f', not all: {reasons}'}",
            flush=True,
        )


def peak(case: str | None, options: argparse.Namespace) -> int:
    """Peak bytes of three steps in a fresh process; `case` None is the unquantized model."""
    command = [sys.executable, "-P", __file__, "--peak", case or "none", "--tokens", str(options.tokens)]
    command += ["--learn", options.learn, "--device", options.device, "--model", options.model]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed, of each model; 0 measures memory only")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--learn", default="dual_lsq", help="as scheme.learn")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; may be repeated")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="embedded", choices=("embedded", *RANDOM))
    parser.add_argument("--micro", type=int, default=1, help="micro-batches of a step; several compare `hold_weights`")
    parser.add_argument("--graphs", action="store_true", help="passes of both models as CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="compare blocks as they are and as graphs")
    parser.add_argument("--no-peak", dest="peaks", action="store_false", help="time only: no processes for memory")
    parser.add_argument("--json")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from qat.trainers.memory import keep_freed_blocks, peak_bytes

    keep_freed_blocks()
    import torch

    torch.manual_seed(0)
    vocabulary = RANDOM.get(arguments.model, LLAMA_1B)["vocab_size"]
    ids = torch.randint(0, vocabulary, (2, arguments.tokens // 2)).to(arguments.device)
    from qat.kernels.load import load_for_training

    load_for_training()
    how = (arguments.learn, arguments.model, arguments.device)
    if arguments.peak:
        model, optimizer = build(*CASES.get(arguments.peak, (None, None)), *how)
        for _ in range(3):
            step(model, optimizer, ids)
        print(peak_bytes(torch.device(arguments.device)))
        return
    if arguments.compile:
        compare_compiled(how, arguments, ids)
        return
    if arguments.micro > 1:
        compare_held(how, arguments, ids)
        return
    plain_peak = peak(None, arguments) if arguments.peaks else 0
    cases = arguments.case or list(CASES)
    ratios = {name: peak(name, arguments) / plain_peak if arguments.peaks else None for name in cases}
    for name, ratio in ratios.items() if arguments.peaks else ():
        print(f"{name:<22} peak memory {ratio:.3f}x of {plain_peak / 1e9:.2f} GB", flush=True)
    if not arguments.steps:
        return
    plain = build(None, None, *how)
    graphs = {True: recorded(plain[0], ids[:, 1:].numel())} if arguments.graphs else {}
    rows = []
    for name in cases:
        quantized = build(*CASES[name], *how)
        if graphs:
            graphs[False] = recorded(quantized[0], ids[:, 1:].numel())
        times: tuple[list[float], list[float]] = ([], [])
        for index in range(arguments.steps + 2):
            for side, pair in enumerate((plain, quantized)):
                seconds = step(*pair, ids, passes=graphs.get(pair is plain))
                if index >= 2:
                    times[side].append(seconds)
        medians = [statistics.median(side) for side in times]
        rows.append({"case": name, "plain_s": medians[0], "qat_s": medians[1], "time_ratio": medians[1] / medians[0],
                     "memory_ratio": ratios[name], "steps": arguments.steps, "graphs": arguments.graphs,
                     "tokens": arguments.tokens})  # fmt: skip
        print(
            f"{name:<22} {medians[1]:.2f} s against {medians[0]:.2f} s: {rows[-1]['time_ratio']:.3f}x time", flush=True
        )
        if arguments.learn == "refit":
            rows[-1]["refit_s"] = refit_seconds(*quantized, ids)
            share = rows[-1]["refit_s"] / medians[1]
            print(
                f"{'':<22} a refit takes {rows[-1]['refit_s']:.2f} s; every {EVERY} steps: {1 + share / EVERY:.3f}x; "
                f"1.05x from every {math.ceil(share / 0.05)} on",
                flush=True,
            )
        del quantized
        graphs.pop(False, None)
    if arguments.json:
        about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
                 "device": arguments.device, "model": arguments.model}  # fmt: skip
        with open(arguments.json, "w") as file:
            json.dump({**about, "learn": arguments.learn, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
