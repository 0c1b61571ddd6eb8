"""The closed-form rules for tiles at the edges of their conditions: numbers by hand for an H100, so that a sign, an
axis or an off-by-one in them is seen without one."""

from itertools import pairwise

import pytest

from qat.kernels.device import Device
from qat.kernels.fake_quantize.choose import plan
from qat.kernels.packed_linear import choose as packed
from qat.kernels.packed_linear.dense import choose as dense
from qat.kernels.quantized_matmul import choose as matmul
from qat.numbers.catalog import lookup

H100 = Device(capability=90, processors=132, shared=227 * 1024)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "block_n", "block_m", "splits", "warps", "stages"),
    [
        (1, 4096, 4096, 64, 16, 2, 4, 4),  # 64 blocks on 132 processors: twice
        (16, 4096, 4096, 64, 16, 2, 4, 4),
        (17, 4096, 4096, 64, 32, 2, 4, 4),
        (33, 8448, 4096, 128, 64, 2, 8, 3),  # 8448 = 128 * 132 / 2 rows are tall, and 66 blocks
        (64, 8447, 4096, 64, 64, 1, 4, 3),
        (65, 28672, 4096, 128, 64, 1, 8, 3),
        (1, 64, 65536, 64, 16, 8, 4, 4),  # never more than 8 pieces
        (1, 64, 1024, 64, 16, 2, 4, 4),  # each of four steps of 128 columns
        (1, 64, 1023, 64, 16, 2, 4, 4),
        (1, 64, 512, 64, 16, 1, 4, 4),
    ],
)
def test_tiles_of_packed_weights(
    tokens: int, rows: int, columns: int, block_n: int, block_m: int, splits: int, warps: int, stages: int
) -> None:
    tiles = packed.choose(tokens, rows, columns, 128, H100.processors)
    assert (tiles.block_n, tiles.block_m, tiles.splits) == (block_n, block_m, splits)
    assert (tiles.warps, tiles.stages) == (warps, stages)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "tile", "block_m", "pieces"),
    [
        (1, 8192, 8192, 256, 16, 4),  # 128 blocks on 132 processors: four each
        (16, 8192, 8192, 256, 16, 4),
        (17, 8192, 8192, 256, 64, 4),  # more tokens change no sum
        (64, 4096, 4096, 256, 64, 4),  # each of four steps
        (64, 4096, 4096, 128, 64, 8),
        (1, 28672, 4096, 256, 16, 1),
        (1, 4096, 14336, 256, 16, 8),
        (1, 4864, 7424, 256, 16, 6),  # seven of five steps would leave one without
        (1, 64, 65536, 256, 16, 32),  # never more than 32
        (1, 64, 768, 256, 16, 1),
    ],
)
def test_tiles_of_panels(tokens: int, rows: int, columns: int, tile: int, block_m: int, pieces: int) -> None:
    tiles = packed.choose_panels(tokens, rows, columns, tile, H100.processors)
    assert (tiles.block_n, tiles.block_m, tiles.pieces, tiles.warps, tiles.stages) == (64, block_m, pieces, 4, 3)
    assert packed.choose_panels(4096, rows, columns, tile, H100.processors).pieces == pieces


@pytest.mark.parametrize(
    ("tokens", "bits", "pays"),
    [
        (1, 4, False),
        (192, 2, False),  # three tiles decode as long as four bytes move; a dense weight moves four and a quarter
        (193, 4, True),  # four tiles: 5.3 bytes against 4.5
        (192, 4, False),
        (193, 8, True),
        (4096, 4, True),  # the library's product is the bound: 39 of 85 bytes
    ],
)
def test_many_tokens_are_multiplied_densely(tokens: int, bits: int, pays: bool) -> None:
    assert dense.pays(tokens, bits) == pays and (tokens > dense.FEW) >= pays


def test_slices_of_dense_rows() -> None:
    """Whole steps, nearly equal, together all rows, and never more memory than allowed."""
    for rows, columns, step, sizes in (
        (8192, 8192, 64, [8192]),
        (28672, 4096, 64, [14336, 14336]),
        (16448, 8192, 64, [5504, 5504, 5440]),
        (100, 640, 128, [100]),
        (192, 2**21, 64, [64, 64, 64]),  # not even one panel fits
    ):
        found = dense.slices(rows, columns, step)
        assert [len(one) for one in found] == sizes and found[-1].stop == rows
        assert all(one.start % step == 0 and one.stop == two.start for one, two in pairwise(found))
        assert max(sizes) <= max(dense.SLICE_BYTES // (2 * columns), step)


@pytest.mark.parametrize(
    ("tokens", "rows", "x", "w", "operands", "block_n", "block_m", "segments", "parallel"),
    [
        (1, 4096, "int8_token", "int8_channel", ("int8", 128, 1, 0), 64, 16, 2, True),
        (1, 4096, "nvfp4", "nvfp4", ("float16", 32, 4, 0), 64, 16, 2, True),
        (64, 8448, "fp8_token", "fp8_channel", ("float8", 128, 1, 128), 128, 64, 2, True),
        (64, 8447, "fp8_token", "fp8_channel", ("float8", 128, 1, 128), 64, 64, 1, False),
        (65, 4096, "fp8_g128", "fp8_b128", ("float8", 128, 1, 128), 64, 64, 2, True),
        (129, 4096, "fp8_g128", "fp8_b128", ("float8", 128, 1, 128), 64, 64, 2, False),  # 2 * 192 programs are too many
        (4096, 16384, "mxfp4", "mxfp4", ("float8", 32, 4, 32), 128, 32, 1, False),
        (128, 64, "int8_token", "int4_g128", ("int8", 32, 4, 128), 64, 128, 8, True),
        (256, 8192, "int8_token", "int8_channel", ("int8", 128, 1, 0), 128, 256, 1, False),
    ],
)
def test_tiles_of_products(tokens: int, rows: int, x: str, w: str, operands: tuple[str, int, int, int], block_n: int,
                           block_m: int, segments: int, parallel: bool) -> None:  # fmt: skip
    tiles = matmul.choose(tokens, rows, 4096, lookup(x), lookup(w), H100)
    assert (tiles.operand, tiles.part, tiles.parts, tiles.flush) == operands
    assert (tiles.block_n, tiles.block_m, tiles.segments, tiles.parallel) == (block_n, block_m, segments, parallel)


def test_a_group_as_wide_as_a_row_is_one_scale_per_row() -> None:
    assert [matmul.group(lookup("int4_g64"), columns) for columns in (32, 64, 65, 128)] == [0, 0, 64, 64]
    assert matmul.group(lookup("int8_channel"), 128) == 0


@pytest.mark.parametrize(
    ("x", "w", "capability", "kilobytes"),
    [
        ("nvfp4", "nvfp4", 90, 8),  # 64 rows of 32 words, 16 tokens of 128 FP16 operands
        ("fp8_token", "fp8_channel", 80, 20),  # 64 rows and 16 tokens of 128 FP16 operands
        ("int8_token", "int8_channel", 90, 10),  # the same in bytes
    ],
)
def test_a_stage_is_what_one_step_reads(x: str, w: str, capability: int, kilobytes: int) -> None:
    tiles = matmul.choose(1, 4096, 4096, lookup(x), lookup(w), Device(capability, 132, 227 * 1024))
    assert tiles.why.endswith(f"stages of {kilobytes} KB")


def test_two_stages_always_fit() -> None:
    """Into the shared memory of every GPU; fewer tokens per tile where they would not."""
    for shared in (227, 163, 99):
        device = Device(89, 142, shared * 1024)
        tiles = matmul.choose(4096, 16384, 4096, lookup("int8_token"), lookup("int8_channel"), device)
        assert tiles.stages * 128 * (tiles.block_n + tiles.block_m) <= device.shared and tiles.stages >= 2


@pytest.mark.parametrize(
    ("name", "rows", "columns", "values", "programs", "matrix", "tile", "segment", "tiles", "segments"),
    [
        ("nvfp4", 100, 640, 4096, 0, (4000, 16, 1), (256, 16), 16, 16, 1),  # groups are rows
        ("int8_channel", 100, 640, 4096, 0, (100, 640, 1), (32, 128), 128, 20, 5),
        ("int8_channel", 4096, 4096, 2048, 1024, (4096, 4096, 1), (1, 2048), 4096, 8192, 1),
        ("int8_channel", 512, 4096, 2048, 1024, (512, 4096, 1), (1, 2048), 2048, 1024, 2),  # rows are cut in two
        ("fp8_tensor", 64, 4096, 2048, 1024, (1, 262144, 1), (1, 2048), 2048, 128, 128),  # a tensor is one row
        ("fp8_b128", 300, 520, 4096, 0, (300, 520, 5), (32, 128), 128, 50, 5),  # 10 tiles of 32 rows, 5 of 128 columns
        ("int8_channel", 1, 1, 4096, 0, (1, 1, 1), (1, 1), 1, 1, 1),
    ],
)
def test_plans_of_fake_quantization(name: str, rows: int, columns: int, values: int, programs: int,
                                    matrix: tuple[int, int, int], tile: tuple[int, int], segment: int, tiles: int,
                                    segments: int) -> None:  # fmt: skip
    cut = plan(lookup(name), rows, columns, values, programs)
    assert (cut.rows, cut.columns, cut.scale_columns) == matrix and (cut.tile_rows, cut.tile_columns) == tile
    assert (cut.segment, cut.tiles, cut.segments) == (segment, tiles, segments)
