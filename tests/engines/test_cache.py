"""The cache in bytes: the numbers of fake quantization, the operations of transformers, and what a token costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from qat.checkpoints.hf import load_tokenizer
from qat.cli import main
from qat.engines.cache import QuantizedCache, Rows, bytes_per_token, quantized_cache
from qat.engines.transformers import load_packed
from qat.init.calibration import observe
from qat.modes import dense
from qat.numbers.catalog import CATALOG, lookup
from qat.quantizer import InputQuantizer
from qat.sites import sites
from qat.surgery import apply, report
from qat.trainers.job import load_job
from qat.trainers.run import train
from tests.checkpoints.exports import quantized, quiet_export
from tests.engines.served import running
from tests.qat.adapters.test_attention import IDS, caches
from tests.tiny import tiny_model
from tests.trainers.jobs import write

FORMATS = [
    name
    for name, fmt in CATALOG.items()
    if (fmt.block[0] == 1 and fmt.divides(64)) or (fmt.block == (0, 0) and not fmt.zero_point)
]


def made(folder: Path, key: str, value: str, dtype: torch.dtype = torch.float32) -> Any:
    model = apply(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), caches(key, value))
    observe(model, [{"input_ids": IDS}])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_fake_quantization_in_the_format_s_bytes(name: str, dtype: torch.dtype) -> None:
    fmt = lookup(name)
    quantizer = InputQuantizer(fmt, "vllm", "ste", "minmax")
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantizer.amax.fill_(float(x.abs().max()) / 2)
    rows = Rows(quantizer, 64)
    stored = rows.encode(x)
    assert stored.dtype == torch.uint8 and stored.shape == (2, 3, 5, rows.bytes)
    assert torch.equal(rows.decode(stored, dtype), quantizer.quantize(x))
    if 8 % fmt.element.bits == 0 and not fmt.zero_point and len(fmt.elements) == 1:
        assert rows.bytes == fmt.bits_per_row(64) / 8


PAIRS = [
    ("fp8_tensor", "fp8_tensor"),
    ("int8_tensor", "int4_token"),
    ("nvfp4", "nvfp4"),
    ("fp8_token", "int4_g32_asym"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_generation_is_that_of_the_fake_quantized_model(folder: Path, key: str, value: str, dtype: torch.dtype) -> None:
    model = made(folder, key, value, dtype)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0  # two requests of different lengths
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs = model.generate(input_ids=IDS, attention_mask=mask, **options)
    cache = QuantizedCache(model)
    ours = model.generate(input_ids=IDS, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    tokens = cache.get_seq_length()
    assert tokens == IDS.shape[1] + 11
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == len(IDS) * tokens * bytes_per_token(model)[0]


def test_what_a_token_costs(folder: Path) -> None:
    model = made(folder, "fp8_tensor", "nvfp4")
    layers, heads, width = 2, 2, 32
    wanted = layers * heads * (width + width // 2 + width // 16)
    assert bytes_per_token(model) == (wanted, layers * heads * width * 4)
    ((_, _, _, *covered),) = report(model).by_cache()
    assert covered == [*bytes_per_token(model)]
    assert QuantizedCache(model).cost == f"the cache takes {wanted} bytes per token (512 in BF16)"
    with dense(model, inputs=True):
        assert quantized_cache(model) is None


def caches_of(model: Any, *change: Any) -> list[Tensor]:
    """Logits of a last token behind a cache that `change` was done to: ours, and transformers' own."""
    results = []
    for cache in (QuantizedCache(model), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(input_ids=IDS, past_key_values=cache, use_cache=True)
            getattr(cache, change[0])(*change[1:])
            last = model(input_ids=IDS[:, -1:].repeat(cache.layers[0].keys.shape[0] // 2, 1), past_key_values=cache)
        results.append(last.logits)
    return results


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize(
    "change",
    [("crop", -3), ("reorder_cache", torch.tensor([1, 0])), ("batch_repeat_interleave", 2),
     ("batch_select_indices", torch.tensor([1, 1]))],
)  # fmt: skip
def test_operations_of_transformers(kind: str, change: tuple[Any, ...], tmp_path: Path) -> None:
    model = made(tiny_model(kind, tmp_path, num_hidden_layers=2), "int8_token", "int4_token")
    ours, theirs = caches_of(model, *change)
    assert torch.equal(ours, theirs)


def test_sliding_windows_keep_their_last_tokens(tmp_path: Path) -> None:
    model = made(tiny_model("gemma", tmp_path, sliding_window=8), "fp8_token", "fp8_token")
    options = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache = QuantizedCache(model)
    ours = model.generate(input_ids=IDS, past_key_values=cache, **options)
    theirs = model.generate(input_ids=IDS, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert sorted({layer.keys.shape[2] for layer in cache.layers}) == [7, IDS.shape[1] + 9]


def test_beams_and_an_untouched_model(folder: Path) -> None:
    model = made(folder, "int8_token", "int8_token")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids=IDS, past_key_values=QuantizedCache(model), **options),
        model.generate(input_ids=IDS, **options),
    )
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert quantized_cache(plain) is None and bytes_per_token(plain) == (512, 512)


@pytest.fixture(scope="module")
def export(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(folder, tmp_path_factory.mktemp("export") / "out", "compressed-tensors", "int4_g64", "fp8_tensor")


def exported(folder: Path, out: Path, target: str, weight: str, cached: str) -> Path:
    rules = [{"match": "*.self_attn", "key": cached, "value": cached}, {"match": "*_proj", "weight": weight}]
    return quiet_export(quantized(folder, [*rules, {"match": "*", "skip": "left alone"}]), folder, out, target)


WITHOUT = [
    ("compressed-tensors", "int8_channel", "int8_tensor"),
    ("compressed-tensors", "int4_g64", "nvfp4"),
    ("modelopt", "nvfp4", "fp8_tensor"),
]


@pytest.mark.parametrize(("target", "weight", "cached"), WITHOUT)
def test_exports_are_served_with_it(target: str, weight: str, cached: str, folder: Path, tmp_path: Path) -> None:
    model: Any = load_packed(exported(folder, tmp_path / "out", target, weight, cached), torch.float32)
    assert {site.format.name for site in sites(model, "key", "value")} == {cached}
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours = model.generate(input_ids=IDS, past_key_values=QuantizedCache(model), **options)
    theirs = model.generate(input_ids=IDS, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_commands_say_what_a_token_costs(export: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cost = "the cache takes 256 bytes per token (512 in BF16)"
    assert main(["generate", str(export), "The quick", "--tokens", "8"]) == 0
    packed = capfd.readouterr()
    assert cost in packed.err
    model, tokenizer = load_packed(export), load_tokenizer(export)
    inputs = tokenizer("The quick", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert packed.out.strip() == text.strip()
    with running(export) as client:
        body = {"prompt": "The quick", "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
    assert f"qat serve: {cost}" in capfd.readouterr().err
    assert text.endswith(answer.json()["choices"][0]["text"])


def test_runs_generate_with_it_too(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scheme = {"rules": [{"match": "*.self_attn", "key": "fp8_token", "value": "fp8_token"},
                        {"match": "*_proj", "weight": "int4_g64"}, {"match": "*", "skip": "left alone"}]}  # fmt: skip
    job = load_job(write(tmp_path, folder, steps=1, scheme=scheme))
    report = train(job, table=False)
    assert report["caches"] == [
        {"key": "fp8_token", "value": "fp8_token", "modules": 2, "bytes_per_token": 288, "dense_bytes_per_token": 512}
    ]
    out = "".join(capfd.readouterr())
    assert "cached keys fp8_token, values fp8_token: 2 modules, 288 bytes per token (BF16: 512)" in out
    assert "Caches of 2 modules: fp8_token keys" in (job.folder / "report.md").read_text()
    assert main(["generate", str(job.folder), "The quick", "--tokens", "4"]) == 0
    assert "the cache takes 288 bytes per token" in capfd.readouterr().err
