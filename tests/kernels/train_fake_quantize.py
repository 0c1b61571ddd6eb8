"""Run by test_fake_quantize.py: a tiny model, three steps without kernels and three with, on the device named by the
argument ("cpu" under TRITON_INTERPRET=1). On a CPU the first loss is the same to the bit, and the rest but for the
order of sums; on a GPU PyTorch divides by constants less exactly than the kernels, so token scales differ by an ulp."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.kernels.load import KERNELS, register
from qat.quantizer import InputQuantizer
from qat.scheme import Rule, Scheme
from qat.surgery import apply

SCALES = ("effective_scales", "effective_scales_backward")
TRAINING = ("fake_quantize", "fake_quantize_backward", "quantized_linear", "fake_quantize_input", *SCALES)
FORMATS = (("nvfp4", "nvfp4"), ("int4_g32_asym", "int8_token"), ("fp8_b128", "fp8_token"))


class Model(nn.Module):
    """Embedding, two linear layers and a head, so that every operator of training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(96, 64), nn.Linear(64, 160)
        self.down, self.head = nn.Linear(160, 64), nn.Linear(64, 96)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, positions) -> logits."""
        x = self.embed(ids)
        logits: Tensor = self.head(x + self.down(functional.silu(self.up(x))))
        return logits


def train(weight: str, input: str, device: str) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    rules = (Rule(match="embed", weight=weight), Rule(match="*", weight=weight, input=input))
    scheme = Scheme(rules=rules, init=())
    model = apply(Model(), scheme)
    for module in model.modules():
        if isinstance(module, InputQuantizer):
            module.amax.fill_(4.0)
    model.to(device)
    ids = torch.randint(0, 96, (4, 9), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().cpu() for name, p in model.named_parameters()}


def counted(calls: dict[str, int], name: str, kernel: Callable[..., object]) -> Callable[..., object]:
    def run(*arguments: object) -> object:
        calls[name] = calls.get(name, 0) + 1
        return kernel(*arguments)

    return run


def main(device: str) -> None:
    without = [train(*formats, device) for formats in FORMATS]
    from qat.kernels.effective_scales import triton as scales
    from qat.kernels.fake_quantize import triton as kernels
    from qat.kernels.fake_quantize_input import triton as inputs

    if device == "cpu":
        from tests.kernels.interpreted import mend

        mend()
    calls: dict[str, int] = {}
    for module, names in ((kernels, ("fake_quantize", "fake_quantize_backward", "quantized_linear")),
                          (inputs, ("fake_quantize_input",)), (scales, SCALES)):  # fmt: skip
        for name in names:
            setattr(module, name, counted(calls, name, getattr(module, name)))
    for name in TRAINING:
        register(name, device, KERNELS[name]["cuda"])
    for formats, (losses, weights) in zip(FORMATS, without, strict=True):
        found, trained = train(*formats, device)
        exact = device == "cpu"
        assert not exact or found[0] == losses[0], f"{formats}: the first loss differs: {found} and {losses}"
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5 if exact else 1e-2, atol=1e-5)
        for name, value in trained.items() if exact else ():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-5, msg=f"{formats} {name}")
    assert all(calls[name] for name in TRAINING), calls
    print("all trained", calls)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
