"""What is read of quantizers, against the same counted another way."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qat.checkpoints.hf import load_model
from qat.lora import LoraConfig
from qat.numbers.catalog import lookup
from qat.numbers.numerics import qsnr, quantize
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from qat.trainers import quantizer_metrics, why
from qat.trainers.quantizer_metrics import QuantizerMetrics, clipped
from tests.checkpoints.exports import pair_rules, quantized
from tests.qat.twins import packed_and_dense
from tests.tiny import tiny_model

REST = {"match": "*", "skip": "not a projection"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("metrics") / "model")


def model(source: Path, weight: str = "nvfp4", learn: str = "dual_lsq") -> Any:
    return quantized(source, [pair_rules(weight, None), REST], learn=learn)


def move(trained: Any, by: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "_proj" in name:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def test_flips_and_drift_are_those_of_the_report(source: Path, tmp_path: Path) -> None:
    trained = model(source)
    why.keep_start(tmp_path, trained)
    metrics = QuantizerMetrics(trained)
    first = metrics.read(trained)
    assert first["quantizers/flip_rate"] == first["quantizers/flip_rate_last"] == first["quantizers/scale_drift"] == 0
    move(trained)
    second = metrics.read(trained)
    moved = why.moved(tmp_path, trained)
    assert moved is not None
    assert second["quantizers/flip_rate"] == pytest.approx(moved["flipped"], rel=1e-5) and moved["flipped"] > 0.01
    assert second["quantizers/flip_rate_last"] == second["quantizers/flip_rate"]
    kept = load_file(tmp_path / "checkpoints" / why.START / why.CODES)
    scales = {path: site.quantizer.scales().effective() for path, site in weights(trained).items()}
    drifts = torch.cat([(scales[path] / kept[f"{path} scale"]).log2().abs().flatten() for path in scales])
    assert second["quantizers/scale_drift"] == pytest.approx(float(drifts.mean()), rel=1e-4) and drifts.mean() > 0
    third = metrics.read(trained)
    assert third["quantizers/flip_rate_last"] == 0 and third["quantizers/flip_rate"] == second["quantizers/flip_rate"]
    resumed = QuantizerMetrics(trained, tmp_path / "checkpoints" / why.START / why.CODES).read(trained)
    assert resumed["quantizers/flip_rate"] == pytest.approx(second["quantizers/flip_rate"])
    assert resumed["quantizers/flip_rate_last"] == 0
    assert QuantizerMetrics(trained, tmp_path / "nothing").read(trained)["quantizers/flip_rate"] == 0


def test_drift_is_what_learned_scales_say(source: Path) -> None:
    trained = model(source, "int8_channel", "lsq")
    metrics = QuantizerMetrics(trained)
    with torch.no_grad():
        for site in weights(trained).values():
            site.quantizer.log_scale.add_(0.5)
    assert metrics.read(trained)["quantizers/scale_drift"] == pytest.approx(0.5 / 0.6931, rel=0.01)


def test_qsnr_by_layer_and_of_all(source: Path) -> None:
    trained = model(source)
    found = QuantizerMetrics(trained).read(trained)
    sites = weights(trained)
    assert {key for key in found if key.startswith("qsnr/")} == {f"qsnr/{path}" for path in sites}
    expected = {path: qsnr(site.weight, site.value()) for path, site in sites.items()}
    for path, site in sites.items():
        assert found[f"qsnr/{path}"] == pytest.approx(expected[path], abs=0.05), site.path  # value() is rounded to BF16
    total = sum(site.weight.numel() for site in sites.values())
    mean = sum(expected[path] * site.weight.numel() for path, site in sites.items()) / total
    assert found["quantizers/qsnr"] == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "mxfp8", "int4_g32_asym", "if4", "ternary_g64", "q4_k"])
def test_clipped_weights_are_those_whose_error_exceeds_half_a_step(name: str) -> None:
    """Brute force: the step is the widest distance of neighbours at the end of the grid that the weight is beyond."""
    fmt = lookup(name)
    columns = fmt.super_block or 128
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(2))
    scales = quantize(x, fmt).scales
    x[1, 5] *= 30
    x[4, 70] = -12.0
    assert clipped(x, fmt, scales) > 0
    q = quantize(x, fmt, scales)
    count = 0
    for row, column in [(r, c) for r in range(6) for c in range(columns)]:
        block = (row // max(1, q.shape[0] // scales.stored.shape[0]), column * scales.stored.shape[1] // columns)
        scale = scales.effective()[block]
        element = fmt.elements[int(scales.choice[block])] if scales.choice is not None else fmt.element
        zero = float(scales.zero_point[block]) if scales.zero_point is not None else 0.0
        grid = sorted(v for v in element.values if v == v) if scales.zero_point is not None else list(element.grid)
        minimum = 0.0 if scales.minimum is None else float(scales.minimum.effective()[block])
        value = (float(x[row, column]) + minimum) / float(scale) + zero
        low, high = grid[0] - (grid[1] - grid[0]) / 2, grid[-1] + (grid[-1] - grid[-2]) / 2
        count += not low <= value <= high
    assert float(clipped(x, fmt, scales)) * x.numel() == pytest.approx(count)


def test_a_divisor_in_parts_decides_what_is_clipped() -> None:
    fmt = lookup("int4_g32")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    q = quantize(x, fmt)
    divisor = q.scales.effective().repeat_interleave(4, dim=1)
    assert clipped(x, fmt, dataclasses.replace(q.scales, divisor=divisor)) == clipped(x, fmt, q.scales) == 0
    divisor[:, 0] /= 100  # the first eight values of each row
    assert clipped(x, fmt, dataclasses.replace(q.scales, divisor=divisor)) * x.numel() >= 4 * 7


def test_large_weights_are_sampled_and_reading_changes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = model(source)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    monkeypatch.setattr(quantizer_metrics, "SAMPLE", 100)
    metrics = QuantizerMetrics(trained)
    assert all(len(codes) <= 100 for codes in metrics._last.values())
    metrics.read(trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    move(trained)
    assert 0 < metrics.read(trained)["quantizers/flip_rate"] < 1


def test_tied_weights_count_once(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", tie_word_embeddings=True)
    scheme = Scheme(rules=[{"match": "*", "weight": "int8_channel"}], tied="share", init=())
    found = QuantizerMetrics(trained := apply(load_model(source), scheme)).read(trained)
    assert "qsnr/model.embed_tokens" in found and "qsnr/lm_head" not in found


def test_packed_experts_are_read_as_their_dense_twin(tmp_path: Path) -> None:
    """Matrix by matrix: flips, clipping and QSNR of a stack are those of the whole."""
    rules, config = [pair_rules("nvfp4", None, "*.experts.*"), REST], LoraConfig(rank=4, targets="*.experts.*")
    found = []
    for trained in packed_and_dense(tmp_path, "qwen3_moe", rules, "lsq", config):
        why.keep_start(tmp_path, trained)
        metrics = QuantizerMetrics(trained)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if name.endswith(".B"):
                    parameter.mul_(5)
        read, moved = metrics.read(trained), why.moved(tmp_path, trained)
        assert moved is not None and 0 < read["quantizers/flip_rate"] < 1 and read["quantizers/clip_rate"] > 0
        found.append((read, moved["flipped"]))
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
