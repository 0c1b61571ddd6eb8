"""Peak memory and time of the chunked losses against the naive ones, at the embedded model's vocabulary.

Each case runs forward and backward of a loss (by default KL(teacher || student)) from hidden states in a process of its
own; the figure is the growth of the peak resident set over the state before the loss, without the gradient of the head
itself.

    python benchmarks/loss_memory.py [--loss forward_kl] [--tokens 1024] [--vocabulary 49152] [--hidden 576]
"""

import argparse
import subprocess
import sys
import time

LOSSES = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")


def measure(kind: str, name: str, tokens: int, vocabulary: int, hidden: int, chunk: int) -> None:
    """Print 'extra bytes, seconds' of one loss and its backward pass."""
    import torch
    from torch import nn

    from qat.trainers.memory import peak_bytes
    from qat.training.losses import chunked
    from qat.training.objectives import CrossEntropy, ForwardKL, JensenShannon, ReverseKL

    own_loss = dict(zip(LOSSES, (ForwardKL, ReverseKL, JensenShannon, CrossEntropy), strict=True))[name]()
    torch.manual_seed(0)
    heads = [nn.Linear(hidden, vocabulary, bias=False) for _ in range(2)]
    states = [torch.randn(1, tokens, hidden) for _ in range(2)]
    targets = torch.zeros(1, tokens, dtype=torch.long)
    states[0].requires_grad_()
    first = own_loss.tokens(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2), targets[0, :1])
    first.sum().backward()  # what the first use of an operator imports is neither's
    before = peak_bytes(torch.device("cpu"))
    began = time.perf_counter()
    if kind == "chunked":
        loss = chunked(own_loss, states[0], heads[0], states[1], heads[1], targets, chunk)
    else:
        with torch.no_grad():
            reference = heads[1](states[1]).flatten(0, 1)
        loss = own_loss.tokens(heads[0](states[0]).flatten(0, 1), reference, targets.flatten()).sum()
    loss.backward()
    gradient = heads[0].weight.grad
    own = 0 if gradient is None else gradient.nbytes
    print(peak_bytes(torch.device("cpu")) - before - own, time.perf_counter() - began, float(loss.detach()))


def main() -> None:
    """Measure both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.tokens, arguments.vocabulary, arguments.hidden, arguments.chunk)
    if arguments.kind:
        measure(arguments.kind, arguments.loss, *shape)
        return
    names = ("--tokens", "--vocabulary", "--hidden", "--chunk")
    sizes = [str(part) for pair in zip(names, shape, strict=True) for part in pair]
    found, times = {}, {}
    for kind in ("naive", "chunked"):
        command = [sys.executable, __file__, "--kind", kind, "--loss", arguments.loss, *sizes]
        extra, seconds, loss = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        found[kind], times[kind] = int(extra), float(seconds)
        print(f"{kind:<8} {int(extra) / 2**20:8.0f} MiB extra   {float(seconds):6.2f} s   loss {float(loss):.3f}")
    memory, duration = (each["chunked"] / each["naive"] for each in (found, times))
    print(f"chunked uses {memory:.3f} of the naive loss's memory and {duration:.2f} of its time")


if __name__ == "__main__":
    main()
