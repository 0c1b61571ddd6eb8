"""C8 caches between our files and other people's code: msmodelslim makes the same tensors and description of the same
model; vllm-ascend's own config, loaders and attention backend, two versions, take ours and attend to what was trained,
over operators simulated from their documents."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import open_export
from qat.checkpoints.verify import verify
from qat.errors import UnsupportedError
from qat.numbers.catalog import lookup
from qat.training import npu
from qat.training.activations import fake_quantize_input
from tests.ascend.conftest import Model, config
from tests.ascend.exchanged import KINDS
from tests.ascend.places import ENGINES, by_engine, by_msmodelslim
from tests.ascend.test_producer import DESCRIPTION, stored
from tests.checkpoints.exports import quantized, quiet_export
from tests.checkpoints.layouts.test_ascend_caches import ATTENTION, RULES

pytestmark = pytest.mark.ascend
every_engine = pytest.mark.parametrize("version", ENGINES)
TOKENS, PROMPT, HEADS, OF_KEYS, WIDTH = 150, 140, 4, 2, 32  # the prompt and what follows cross a page of 128
K_SCALE, K_OFFSET = (f"{ATTENTION}.k_proj.kv_cache_{what}" for what in ("scale", "offset"))
DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "an offset": (K_OFFSET, lambda offset: offset + 9),
    "scales by the wrong axis": (K_SCALE, lambda scale: scale.view(OF_KEYS, WIDTH).t().flatten()),
}
Consumed = Callable[[str, str], tuple[dict[str, Any], dict[str, Tensor]]]


@pytest.fixture(scope="session")
def unbiased(model: Model) -> Path:
    """msmodelslim runs a model that it has rounded to see its caches, which fails where layers add biases."""
    return model("W4A8_MXFP")


@pytest.fixture(scope="session")
def ours(unbiased: Path) -> Path:
    return quiet_export(
        quantized(unbiased, RULES, activation_rule="ascend"), unbiased, unbiased.parent / "ours-c8", "ascend"
    )


@pytest.fixture(scope="session")
def theirs(unbiased: Path) -> Callable[[bool], Path]:
    @cache
    def make(symmetric: bool) -> Path:
        settings: Any = config(KINDS["W8A8_DYNAMIC"])
        rounds = {"scope": "per_channel", "dtype": "int8", "symmetric": symmetric, "method": "minmax"}
        settings["spec"]["process"].append({"type": "dynamic_cache", "qconfig": rounds, "include": ["*"]})
        return by_msmodelslim(unbiased, unbiased.parent / f"theirs-c8-{symmetric}", settings)

    return make


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {"query": torch.randn(TOKENS, HEADS, WIDTH, generator=generator).bfloat16()}
    channels = torch.linspace(0.25, 4, OF_KEYS * WIDTH).view(OF_KEYS, WIDTH)
    for name in ("key", "value"):
        made[name] = (torch.randn(TOKENS, OF_KEYS, WIDTH, generator=generator) * channels).bfloat16()
    return made


@pytest.fixture(scope="session")
def ranged(ours: Path, given: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our export with scales that fit the keys and values here, some of which clip."""
    folder = tmp_path_factory.mktemp("ranged") / "c8"
    folder.mkdir()
    for file in ours.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return changed(folder, {f"{ATTENTION}.{name[0]}_proj.kv_cache_scale": given[name] for name in ("key", "value")})


def changed(folder: Path, seen: dict[str, Tensor]) -> Path:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, x in seen.items():
        tensors[name] = (x.float().abs().amax(dim=0).flatten() * 0.9 / 127).bfloat16().float()
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def consumed(ranged: Path, given: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Consumed:
    """What an engine says of a folder, and what it attends to: one process for each version."""
    scratch = tmp_path_factory.mktemp("caches")
    save_file({**given, "prompt": torch.tensor(PROMPT)}, scratch / "inputs.safetensors")
    folders = {"ours": ranged}
    for what, (name, change) in DAMAGE.items():
        folders[what] = scratch / what.replace(" ", "-")
        folders[what].mkdir()
        for file in ranged.iterdir():
            (folders[what] / file.name).write_bytes(file.read_bytes())
        (file,) = folders[what].glob("*.safetensors")
        tensors = load_file(file)
        save_file({**tensors, name: change(tensors[name]).contiguous()}, file, {"format": "pt"})

    @cache
    def of(version: str) -> dict[str, dict[str, Any]]:
        jobs = [
            [str(folder), str(scratch / "inputs.safetensors"), str(scratch / f"{version}-{index}.safetensors")]
            for index, folder in enumerate(folders.values())
        ]
        return dict(zip(folders, by_engine(version, "A2", jobs, scratch, "consume_caches.py"), strict=True))

    def look(version: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said = of(version)[what]
        assert "error" not in said, said
        return said, load_file(scratch / f"{version}-{list(folders).index(what)}.safetensors")

    return look


def rounded(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values as fake quantization has them."""
    scales = dict(zip(("key", "value"), open_export(folder).cache_scales(ATTENTION), strict=True))
    fmt = lookup("int8_column")
    return {
        name: fake_quantize_input(given[name].float().flatten(1), fmt, "ascend", "ste", scale).view(given[name].shape)
        for name, scale in scales.items()
    }


def attended(query: Tensor, key: Tensor, value: Tensor, first: int = 0) -> Tensor:
    """torch's own attention, of queries that come at `first`."""
    hidden = torch.arange(len(key))[None] > torch.arange(first, first + len(query))[:, None]
    sides = [side.float().transpose(0, 1)[None] for side in (query, key, value)]
    y = torch.nn.functional.scaled_dot_product_attention(*sides, attn_mask=~hidden, enable_gqa=True)
    return y[0].transpose(0, 1)


def as_expected(found: Tensor, expected: Tensor) -> bool:
    difference, rms = (found.float() - expected).abs(), expected.square().mean().sqrt()
    return bool((difference <= 2**-7 * expected.abs() + 2**-8 * rms).all())


def test_the_producer_writes_the_same(ours: Path, theirs: Callable[[bool], Path]) -> None:
    tensors, made = stored(ours), stored(theirs(True))
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {n: (t.dtype, t.shape) for n, t in made.items()}
    assert sum("kv_cache" in name for name in tensors) == 4
    described = json.loads((theirs(True) / DESCRIPTION).read_text())
    assert described.pop("metadata") == described.pop("optional") == {}
    assert json.loads((ours / DESCRIPTION).read_text()) == described


def test_our_reader_reads_its_caches(theirs: Callable[[bool], Path]) -> None:
    folder = theirs(True)
    key, value = open_export(folder).cache_scales(ATTENTION)
    assert key.shape == value.shape == (64,) and key.unique().numel() > 32
    made = stored(folder)[K_SCALE]
    assert torch.equal(key, made.bfloat16().float())
    assert verify(folder).ok


def test_its_offsets_are_refused(theirs: Callable[[bool], Path]) -> None:
    assert stored(theirs(False))[K_OFFSET].any()
    with pytest.raises(UnsupportedError, match="does not subtract it when it reads it; readable: zeros"):
        load_exported(theirs(False))


@every_engine
def test_the_engine_takes_every_tensor(version: str, consumed: Consumed) -> None:
    said, _ = consumed(version, "ours")
    assert said["scheme"] == "AscendC8KVCacheAttentionMethod" and said["impl"] == "AscendC8AttentionBackendImpl"
    assert said["left"] == [] and said["dtype"] == "torch.int8"
    assert said["checked"] == ["npu_fused_infer_attention_score", "npu_scatter_pa_kv_cache"]


@every_engine
def test_it_attends_to_what_was_trained(
    version: str, consumed: Consumed, ranged: Path, given: dict[str, Tensor]
) -> None:
    """Codes are equal to the last bit. A prompt in one piece attends to itself unrounded; what is written, and later
    pieces, to rounded keys and values."""
    _, made = consumed(version, "ours")
    scales = dict(zip(("key", "value"), open_export(ranged).cache_scales(ATTENTION), strict=True))
    clipped = 0
    for name, scale in scales.items():
        codes, inside = npu.column_codes(given[name].float().flatten(1), scale)
        clipped += int((~inside).sum())
        assert torch.equal(made[f"{name}_codes"].flatten(1), codes.to(torch.int8))
    assert clipped > 0
    query, values = given["query"], rounded(ranged, given)
    later = attended(query[PROMPT:], values["key"], values["value"], PROMPT)
    assert as_expected(made["decoded"], later) and as_expected(made["pieces"][PROMPT:], later)
    first = attended(query[:PROMPT], given["key"][:PROMPT], given["value"][:PROMPT])
    assert as_expected(made["first"], first)
    assert not as_expected(made["decoded"], attended(query[PROMPT:], given["key"], given["value"], PROMPT))


@every_engine
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed(what: str, version: str, consumed: Consumed, ranged: Path, given: dict[str, Tensor]) -> None:
    """The engine takes both without a word. An offset goes into the codes and does not come off again."""
    said, made = consumed(version, what)
    assert said["left"] == []
    values = rounded(ranged, given)
    assert not as_expected(made["decoded"], attended(given["query"][PROMPT:], values["key"], values["value"], PROMPT))
