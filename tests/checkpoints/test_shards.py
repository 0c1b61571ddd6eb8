"""Shards against safetensors' own reader and writer, and against files damaged as disks and people do it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qat.checkpoints.shards import INDEX, SINGLE, STEMS, ShardReader, ShardWriter, read_header
from qat.errors import CheckpointError, UnsupportedError

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)


def bits(tensor: torch.Tensor) -> bytes:
    """The stored bytes, which unlike values also tell NaNs and negative zeros apart."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Every bit pattern is possible, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, top, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def mixed() -> dict[str, torch.Tensor]:
    """Odd sizes in a bad order: written as they come, wide tensors would be misaligned."""
    tensors = {f"z.{dtype}"[8:]: random_tensor(dtype, (3, 5), seed) for seed, dtype in enumerate(reversed(DTYPES))}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "one": torch.ones(1, dtype=torch.uint8),
    }
    tensors["strided"] = torch.arange(12, dtype=torch.int32).reshape(3, 4).t()
    return tensors


def write(out: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> Path:
    with ShardWriter(out, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return out


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 300, 10**9])
def test_every_dtype_round_trips_bit_for_bit(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = mixed()
    out = write(tmp_path / "out", tensors, max_shard_bytes)
    theirs = {name: t for shard in sorted(out.glob("*.safetensors")) for name, t in load_file(shard).items()}
    with ShardReader(out) as reader:
        reader.verify_complete()
        assert reader.names() == sorted(tensors) == sorted(theirs)
        for name, tensor in tensors.items():
            for loaded in (reader.get(name), theirs[name]):
                assert loaded.dtype == tensor.dtype
                assert loaded.shape == tensor.shape
                assert bits(loaded) == bits(tensor)
            info = reader.info(name)
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert reader.metadata == {"format": "pt"}


def test_one_shard_is_byte_for_byte_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b": random_tensor(torch.bfloat16, (7, 3)),
        "a": random_tensor(torch.float32, (5,)),
        "ü": random_tensor(torch.uint8, (3,)),
        "c": random_tensor(torch.float32, ()),
        "d": torch.tensor([3, 4]),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (write(tmp_path / "ours", tensors) / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_fill_up_to_the_limit_and_the_index_says_where(tmp_path: Path) -> None:
    sizes = {"a": 40, "b": 60, "c": 1, "huge": 250, "d": 100}  # limit 100: ab | c | huge | d
    out = write(tmp_path / "out", {name: torch.zeros(n, dtype=torch.int8) for name, n in sizes.items()}, 100)
    index = json.loads((out / INDEX).read_text())
    shard = {
        name: f"model-0000{n}-of-00004.safetensors" for n, names in enumerate(("ab", "c", (), "d"), 1) for name in names
    }
    assert index == {
        "metadata": {"total_size": 451},
        "weight_map": shard | {"huge": "model-00003-of-00004.safetensors"},
    }
    assert sorted(path.name for path in out.iterdir()) == sorted({INDEX, *index["weight_map"].values()})


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"a": torch.zeros(3)})
    assert [path.name for path in out.iterdir()] == [SINGLE]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9)), min_size=1, max_size=12),
    limit=st.integers(1, 80),
)
def test_any_mix_is_readable_and_within_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[torch.dtype, int]], limit: int
) -> None:
    tensors = {f"t{i}": random_tensor(dtype, (n,), i) for i, (dtype, n) in enumerate(sizes)}
    out = write(tmp_path_factory.mktemp("mix") / "out", tensors, limit)
    reader = ShardReader(out)
    reader.verify_complete()
    for shard in reader.shards:
        loaded = load_file(shard)
        assert all(bits(tensor) == bits(tensors[name]) for name, tensor in loaded.items())
        assert len(loaded) == 1 or sum(tensor.nbytes for tensor in loaded.values()) <= limit
    assert reader.names() == sorted(tensors)


def test_added_tensors_are_copied_at_once(tmp_path: Path) -> None:
    buffer = torch.zeros(4)
    with ShardWriter(tmp_path / "out") as writer:
        for value in range(3):
            buffer.fill_(value)
            writer.add(f"t{value}", buffer)
        assert writer.total_bytes == 48
    reader = ShardReader(tmp_path / "out")
    assert [reader.get(f"t{value}").tolist() for value in range(3)] == [[value] * 4 for value in range(3)]


def test_parameters_and_shared_storage_are_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    write(tmp_path / "out", {"a": weight, "b": weight[:, 1:], "c": weight})
    loaded = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(loaded[name], t) for name, t in {"a": weight, "b": weight[:, 1:], "c": weight}.items())


def test_other_files_travel_with_the_weights(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        (writer.folder / "config.json").write_text("{}")
        writer.add("a", torch.zeros(2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", SINGLE]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    refused: list[tuple[str, torch.Tensor, type[Exception], str]] = [
        ("a", torch.zeros(2), CheckpointError, "twice"),
        ("", torch.zeros(2), CheckpointError, "cannot name"),
        ("__metadata__", torch.zeros(2), CheckpointError, "cannot name"),
        ("meta", torch.zeros(2, device="meta"), CheckpointError, "meta"),
        ("sparse", torch.eye(3).to_sparse(), CheckpointError, "sparse"),
        ("complex", torch.zeros(2, dtype=torch.complex64), UnsupportedError, "complex64"),
    ]
    with ShardWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(2))
        for name, tensor, error, message in refused:
            with pytest.raises(error, match=message):
                writer.add(name, tensor)
    assert ShardReader(tmp_path / "out").get("a").tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="inside"):
        writer.add("late", torch.zeros(2))
    with pytest.raises(CheckpointError, match="no tensor"), ShardWriter(tmp_path / "empty"):
        pass
    with pytest.raises(CheckpointError, match="positive"):
        ShardWriter(tmp_path / "none", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_error_and_existing_folder_leave_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "out", 10) as writer:
        writer.add("a", torch.zeros(9))
        writer.add("b", torch.zeros(9))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="not empty"):
        write(tmp_path / "out", {"a": torch.zeros(1)})
    assert ShardReader(tmp_path / "out").get("a").item() == 1
    with ShardWriter(tmp_path / "out", overwrite=True) as writer:
        writer.add("a", torch.full((1,), 2.0))
    assert ShardReader(tmp_path / "out").get("a").item() == 2
    with (
        pytest.raises(CheckpointError, match=r"needs 2000\.00 TB"),
        ShardWriter(tmp_path / "x", 10**15, expected_bytes=10**15),
    ):
        pytest.fail("the block must not start")


KILLED = """
import sys, time, torch
from pathlib import Path
from qat.checkpoints.shards import ShardWriter
with ShardWriter(Path(sys.argv[1]), 1000) as writer:
    for number in range(10):
        writer.add(str(number), torch.zeros(100))
    print("writing", flush=True)
    time.sleep(60)
"""


def test_kill_while_writing_leaves_no_checkpoint_and_the_next_write_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".out.partial-")
    assert not list(partial.glob("*.safetensors")), "nothing unfinished carries a name that a loader looks for"
    write(out, {"a": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_while_writing_is_named(small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match="disk became full"), ShardWriter(small_disk / "out") as writer:
        for number in range(100):
            writer.add(str(number), torch.zeros(100_000))
    assert list(small_disk.iterdir()) == []


def test_full_disk_at_the_last_step_is_named(small_disk: Path) -> None:
    """The spool fits, its copy into a shard does not: the error comes when the block ends."""
    ended = False
    with pytest.raises(CheckpointError, match="disk became full"), ShardWriter(small_disk / "out") as writer:
        writer.add("a", torch.zeros(650_000))
        ended = True
    assert ended
    assert list(small_disk.iterdir()) == []


# --- reading damaged folders -----------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "sharded", {name: torch.full((50,), float(ord(name))) for name in "abcd"}, 400)


def resize(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    bad = sharded / "model-00002-of-00002.safetensors"
    resize(bad, keep if keep >= 0 else bad.stat().st_size - 1)
    reader = ShardReader(sharded)
    assert reader.get("a").tolist() == [97.0] * 50, "whole shards stay readable"
    for read in (lambda: reader.get("c"), reader.verify_complete):
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is truncated"):
            read()


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {name: torch.zeros(50) for name in "abcdef"}, 200)
    (folder / "model-00001-of-00006.safetensors").unlink()
    resize(folder / "model-00002-of-00006.safetensors", 100)
    resize(folder / "model-00003-of-00006.safetensors", 9999)
    (folder / "model-00004-of-00006.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lost"] = "model-00005-of-00006.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    reader = ShardReader(folder)
    with pytest.raises(CheckpointError) as caught:
        reader.verify_complete()
    lines = str(caught.value).splitlines()[1:]
    for line, (shard, problem) in zip(
        lines,
        [
            (1, "missing"),
            (2, "truncated"),
            (3, "too long"),
            (4, "not a safetensors"),
            (5, "lacks 1 tensors .* lost"),
        ],
        strict=True,
    ):
        assert f"model-0000{shard}-of" in line
        assert problem.split(" .* ")[0] in line
        assert problem.split(" .* ")[-1] in line
    with pytest.raises(CheckpointError, match="lacks 'lost'"):
        reader.get("lost")
    with pytest.raises(CheckpointError, match="missing"):
        reader.get("a")


def test_unknown_tensor_names_the_nearest(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'aa'; nearest: a"):
        ShardReader(sharded).get("aa")


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path: Path, sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        ShardReader(tmp_path)
    save_file({"a": torch.zeros(1)}, sharded / SINGLE)
    with pytest.raises(CheckpointError, match="both"):
        ShardReader(sharded)
    (sharded / SINGLE).unlink()
    unreadable = ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [["a", "b"]]}', '{"weight_map": {"a": 3}}')
    for text in (*unreadable, '{"weight_map": {"a": "x", "a": "y"}}'):
        (sharded / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match="weight_map"):
            ShardReader(sharded)
    (sharded / INDEX).write_text('{"weight_map": {"a": "../sharded/model-00001-of-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside"):
        ShardReader(sharded)


def test_tensors_that_the_index_does_not_know_are_named(sharded: Path) -> None:
    """transformers would load them, and of a tensor in two shards the last; others go by the index."""
    first, second = ShardReader(sharded).shards
    save_file({"c": torch.zeros(50), "d": torch.zeros(50), "a": torch.ones(50)}, second)
    with pytest.raises(CheckpointError, match=rf"{second.name} holds 1 tensors that .* does not list there: a"):
        ShardReader(sharded).verify_complete()
    save_file({"c": torch.zeros(50), "d": torch.zeros(50), "e": torch.ones(50)}, second)
    with pytest.raises(CheckpointError, match=rf"{second.name} holds 1 tensors that .* does not list there: e"):
        ShardReader(sharded).verify_complete()
    assert ShardReader(sharded).names() == ["a", "b", "c", "d"] and first.is_file()
    (sharded / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="lists no tensor"):
        ShardReader(sharded)


GOOD = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}',
        '{"dtype": "F32", "shape": null, "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 5]}',
        '{"dtype": 7, "shape": [1], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [1]}',
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}',
        f'{GOOD}, "a": {GOOD}',
        "[1]",
    ],
)
def test_headers_with_wrong_types_are_no_safetensors(tmp_path: Path, entry: str) -> None:
    file = tmp_path / SINGLE
    header = f'{{"a": {GOOD}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert list(read_header(file)[0]) == ["a"]
    header = f'{{"a": {entry}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(file)


def test_header_length_of_a_damaged_file_is_not_trusted(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(file)


def test_types_torch_lacks_are_named_only_when_asked_for(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    file = tmp_path / SINGLE
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    reader = ShardReader(tmp_path)
    reader.verify_complete()
    with pytest.raises(UnsupportedError, match="F6_E2M3"):
        _ = reader.info("x").dtype


def test_files_of_another_name(tmp_path: Path) -> None:
    """As on Ascend; a folder with both names is refused, since engines may read every file."""
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    for size, count in ((1 << 20, 1), (12, 3)):
        with ShardWriter(tmp_path / f"of {count}", size, stem=STEMS[1]) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        assert len([*(tmp_path / f"of {count}").glob(f"{STEMS[1]}*")]) == count
        assert all(torch.equal(ShardReader(tmp_path / f"of {count}").get(n), t) for n, t in tensors.items())
    save_file(tensors, tmp_path / "of 1" / SINGLE)
    with pytest.raises(CheckpointError, match="weights called model and quant_model_weights"):
        ShardReader(tmp_path / "of 1")
