"""Tiles that were measured on a GPU and take the place of the closed-form rules there: one file per GPU in tuned/.

`benchmarks/tune.py` writes the files; nothing is tuned while a model runs, and without a file for the GPU the rules of
`choose.py` hold. Pieces of K are never overridden: they decide the order of sums, which must not depend on the batch.
"""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from qat.errors import ConfigError

FOLDER = Path(__file__).with_name("tuned")
Tiles = TypeVar("Tiles", bound=Any)  # a frozen dataclass with the fields below and `why`


class Launch(NamedTuple):
    """What a table may say of a launch."""

    block_n: int
    block_m: int
    warps: int
    stages: int


BLOCKS = (16, 32, 64, 128, 256)
ALLOWED = {"block_n": BLOCKS, "block_m": BLOCKS, "warps": (1, 2, 4, 8), "stages": (1, 2, 3, 4, 5, 6)}
Table = dict[str, dict[int, Launch | None]]  # `case` -> tokens -> launch, or None where the rule was the fastest


def case(operator: str, formats: str, rows: int, columns: int) -> str:
    """The name of a product in a table, "packed_linear FORMAT 4096x4096"."""
    return f"{operator} {formats} {rows}x{columns}"


def file(gpu: str) -> Path:
    """Where the table of a GPU lies, by torch's name of it."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def gpu_of(tensor: torch.Tensor) -> str:
    """torch's name of the tensor's GPU; "" on a CPU, where Triton only interprets."""
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else ""


@cache
def table(gpu: str) -> tuple[str, Table]:
    """Who measured (commit and versions), and the launches; nothing for a GPU without a file.

    Raises:
        ConfigError: the file does not say what a table says.
    """
    path = file(gpu)
    if not gpu or not path.is_file():
        return "", {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = {
            name: {int(tokens): None if values is None else Launch(*values) for tokens, values in launches.items()}
            for name, launches in told["launches"].items()
        }
        about = str(told["about"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no table of launches ({error}); write it again: benchmarks/tune.py") from error
    for name, launches in found.items():
        for tokens, launch in launches.items():
            values = {} if launch is None else launch._asdict()
            if tokens < 1 or any(type(v) is not int or v not in ALLOWED[field] for field, v in values.items()):
                raise ConfigError(f"{path}: {name} asks for {launch} for {tokens} tokens; allowed are {ALLOWED}")
    return about, found


def override(tiles: Tiles, gpu: str, name: str, tokens: int) -> Tiles:
    """What the GPU's table says for the product and the next measured number of tokens; `tiles` where it is silent."""
    about, launches = table(gpu)
    measured = launches.get(name, {})
    at = min((count for count in measured if count >= tokens), default=0)
    launch = measured.get(at)
    if launch is None:
        return tiles
    why = f"measured on {gpu} for {at} tokens ({about}): tiles of {launch.block_n} rows x {launch.block_m} tokens"
    chosen: Tiles = replace(tiles, **launch._asdict(), why=why)
    return chosen
