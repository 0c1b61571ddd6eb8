"""The files of a teacher's cache: what is written is read, half a file is no file, and who writes is alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from qat.errors import CheckpointError, DataError
from qat.trainers import logitcache
from qat.trainers.forward import Head
from qat.trainers.logitcache import Store, TeacherCache, row_key
from qat.training.known import Known, drawn, likeliest, thinned

VOCABULARY, K = 300, 64


def said(tokens: int, seed: int, kind: str = "topk") -> Known:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, VOCABULARY, generator=generator)
    if kind == "topk":
        return likeliest(logits, K)
    return (drawn if kind == "sample" else thinned)(logits, K, generator)


@pytest.mark.parametrize("kind", ["topk", "sample", "hybrid"])
def test_what_is_written_is_read_in_any_order(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several files, from the writing process and from another one, rounded as the types say."""
    monkeypatch.setattr(logitcache, "SHARD_BYTES", 20_000)
    rows = {bytes([number] * 16): said(5 + 17 * number, number, kind) for number in range(6)}
    store = Store.read(tmp_path / "cache")
    with store.writing() as writer:
        for key, known in rows.items():
            writer.add(key, known)
    assert len(store.shards) > 2
    order = [5, 0, 3]
    for reader in (store, Store.read(tmp_path / "cache")):
        found = reader.columns([bytes([number] * 16) for number in order])
        assert [found.ids.dtype, found.log_p.dtype] == [torch.int32, torch.float16]
        expected = [rows[bytes([number] * 16)] for number in order]
        assert torch.equal(found.ids, torch.cat([known.ids for known in expected]).int())
        assert torch.equal(found.log_p, torch.cat([known.log_p for known in expected]).half())
        for place, name in ((2, "topk"), (3, "hybrid")):
            columns = [known[place] for known in expected]
            if kind == name:
                assert torch.equal(found[place], torch.cat(columns))
            else:
                assert found[place] is None


@pytest.mark.parametrize("kind", ["topk", "sample", "hybrid"])
def test_a_token_takes_what_is_said_and_at_most_400_bytes(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path)
    with store.writing() as writer:
        for number in range(4):
            writer.add(bytes([number] * 16), said(512, number, kind))
    each = store.nbytes / (4 * 512)
    promised = TeacherCache(kind=kind, k=K).bytes_per_token
    assert promised <= each <= promised + 0.5 and each <= 400


def test_a_row_is_all_that_it_is() -> None:
    row = np.arange(30, dtype=np.int32).reshape(3, 10)
    key = row_key(row)
    assert len(key) == 16 and row_key(row.astype(np.int64).astype(np.int32)) == key
    for channel in range(3):
        other = row.copy()
        other[channel, 4] += 1
        assert row_key(other) != key


def test_rows_that_were_complete_survive_whatever_ends_the_work(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.writing() as writer:
        writer.add(b"a" * 16, said(3, 0))
        raise KeyboardInterrupt
    again = Store.read(tmp_path)
    assert set(again.places) == {b"a" * 16}
    (tmp_path / ".rows-1.safetensors.partial-1234").write_bytes(b"half a file that a killed process left")
    with again.writing() as writer:
        writer.add(b"b" * 16, said(3, 1))
    assert set(Store.read(tmp_path).places) == {b"a" * 16, b"b" * 16}
    assert not list(tmp_path.glob(".*.partial-*"))


def test_work_is_on_disk_before_a_minute_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logitcache, "SHARD_SECONDS", 0.0)
    with Store(tmp_path).writing() as writer:
        writer.add(b"a" * 16, said(3, 0))
        assert b"a" * 16 in Store.read(tmp_path).places


def test_two_processes_do_not_fill_one_folder(tmp_path: Path) -> None:
    with (
        Store(tmp_path).writing(),
        pytest.raises(CheckpointError, match="another process is filling"),
        Store(tmp_path).writing(),
    ):
        pass


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:4], lambda b: b[:8] + b"x" + b[9:]])
def test_damaged_files_are_named(tmp_path: Path, damage: object) -> None:
    with Store(tmp_path).writing() as writer:
        writer.add(b"a" * 16, said(3, 0))
    (path,) = tmp_path.glob("rows-*")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]  # a lambda
    with pytest.raises(DataError, match=rf"{path.name} is damaged"):
        Store.read(tmp_path)


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "teacher.json").write_text("[1")
    with pytest.raises(DataError, match=r"teacher\.json is damaged"):
        Store.read(tmp_path)


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_layer_and_hidden_states_come_back_bit_for_bit(tmp_path: Path, bias: bool) -> None:
    """Weights that BF16 holds are stored so; others are not."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 33, bias=bias)
    if not bias:
        linear.weight.data = linear.weight.data.bfloat16().float()
    head = Head(linear, (("divide", 2.0), ("softcap", 5.0)))
    hidden = torch.randn(12, 8).bfloat16()
    store = Store(tmp_path)
    store.keep_heldout("1234" * 16, hidden, head)
    assert store.has_heldout("1234" * 16) and not store.has_heldout("5678" * 16)
    found, states = store.heldout("1234" * 16, torch.device("cpu"))
    assert torch.equal(states, hidden)
    assert torch.equal(found(hidden.float()), head(hidden.float()))
    with safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert file.get_tensor("weight").dtype == (torch.float32 if bias else torch.bfloat16)


def test_an_output_layer_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="output layer is a Sequential"):
        Store(tmp_path).keep_heldout("1", torch.zeros(2, 2), Head(nn.Sequential()))
