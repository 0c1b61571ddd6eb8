"""Every layout gives back what it was given; where a code lies, what is refused, and how many bytes move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qat.errors import ConfigError
from qat.numbers.catalog import lookup
from qat.serving.layouts import LAYOUTS, find_layout, table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "ascend_layouts.md"
BEGIN, END = "<!-- begin: tests/qat/serving/test_layouts.py -->\n", "<!-- end -->\n"
CASES = [(name, bits) for name, layout in LAYOUTS.items() for bits in layout.bits or (8,)]
every_case = pytest.mark.parametrize(("name", "bits"), CASES)


@every_case
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 3), max_size=1), st.integers(1, 150), st.integers(1, 150), st.integers(0, 2**31))
def test_back_is_where_it_came_from(name: str, bits: int, lead: list[int], rows: int, columns: int, seed: int) -> None:
    shape = (*lead, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    laid = LAYOUTS[name].from_plain(plain, bits)
    assert laid.is_contiguous() and laid.numel() * laid.itemsize * 8 >= plain.numel() * bits
    assert torch.equal(LAYOUTS[name].to_plain(laid, bits, rows, columns), plain)


@pytest.mark.parametrize(("name", "turned", "width"), [("zn", False, 32), ("nz", True, 32), ("zn-16b", False, 16)])
def test_nibbles_of_blocks(name: str, turned: bool, width: int) -> None:
    """Nibble i of a blob, the low one of a byte first, is number i of the blocks, whose rows have `width` bytes."""
    n, k, c0 = 40, 96, 2 * width
    plain = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    raw = LAYOUTS[name].from_plain(plain, 4).flatten().tolist()
    matrix = plain.t() if turned else plain
    rows, columns = matrix.shape
    high = -(-rows // 16) * 16
    for r in range(rows):
        for c in range(columns):
            at = c // c0 * high * c0 + r * c0 + c % c0
            assert raw[at // 2] >> 4 * (at % 2) & 15 == matrix[r, c]


def test_eight_codes_of_a_column_share_an_integer() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, 3)
    (first, second), *_ = LAYOUTS["int32-n"].from_plain(codes, 4).tolist()
    assert (first & 0xFFFFFFFF, second & 0xFFFFFFFF) == (0x76543210, 0xFEDCBA98)


def test_the_oracle_of_npu_blocks_of_int4() -> None:
    """`npu_convert_weight_to_int4pack` documents (n / 64, k / 16, 16, 8) int32 for a (k, n) weight in FRACTAL_NZ: "nz"
    in bytes, so each row of 64 codes along n is eight of its integers."""
    codes = torch.randint(0, 16, (128, 32), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    blocks = LAYOUTS["nz"].from_plain(codes, 4)
    words = blocks.contiguous().view(torch.int32)
    assert words.shape == (2, 2, 16, 8)
    by_rows = LAYOUTS["int32-n"].from_plain(codes, 4)  # (k, n / 8)
    assert torch.equal(words[1, 1, 3], by_rows[16 + 3, 8:])


@pytest.mark.parametrize(
    ("name", "format", "says"),
    [
        ("zn", "int4_g64_asym", "does not stand for the number zero"),
        ("pairs-k", "int8_channel", "8 bits, not 4"),
        ("zn", "int3_g64", "3 bits, not 4 or 8"),
        ("mx-pairs", "nvfp4", "not e8m0"),
        ("swizzled", "int4_g64", "not e8m0 or e4m3"),
        ("zn", "nf4_g64", "does not stand for the number zero"),
    ],
)
def test_what_is_refused(name: str, format: str, says: str) -> None:
    assert says in str(LAYOUTS[name].problem(lookup(format)))


def test_what_is_taken() -> None:
    for name, format in (("zn", "int8_channel"), ("nz", "nvfp4"), ("mx-pairs", "mxfp8"), ("swizzled", "nvfp4")):
        assert find_layout(name).problem(lookup(format)) is None
    with pytest.raises(ConfigError, match=r"no layout called 'NZ'.*all: unpacked"):
        find_layout("NZ")


class BytesMoved(TorchDispatchMode):
    """What operators read and write, of those that make a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.read += sum(t.numel() * t.itemsize for t in args if isinstance(t, torch.Tensor))
            self.written += out.numel() * out.itemsize
        return out


@pytest.mark.parametrize("name", ["zn", "nz"])
def test_bytes_of_one_conversion(name: str) -> None:
    """Blocks of a weight of B bytes cost one reading and one writing of it, 2 B: as docs/ascend_layouts.md reckons."""
    weight = torch.randint(0, 256, (256, 512), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with BytesMoved() as moved:
        LAYOUTS[name].from_plain(weight, 8)
    assert moved.read == moved.written == weight.numel()


def test_the_table_of_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), f"paste this into {PAGE.name}:\n{table()}"
