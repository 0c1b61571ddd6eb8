"""Every number format the project knows, one literal each. Adding a format here is all that adding a format takes.

Names: `int4_g64` is element, underscore, block. Blocks run along the last dimension (the reduction axis of a linear
layer). Tests, the export targets, `qat formats` and the README table read this catalogue; nothing else may hold an
element's constants. Sources: OCP Microscaling v1.0; NVIDIA's NVFP4; bitsandbytes' NF4; DeepSeek-V3 for 128x128 blocks.
"""

from dataclasses import replace
from typing import Any

from qat.errors import FormatError, nearest
from qat.numbers.element import integer, minifloat, table, unsigned
from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F16, F32, S8, U6, U6_MINIMUM, UE4M3

E2M1 = minifloat(2, 1)
E2M3 = minifloat(2, 3)
E4M3 = UE4M3.element
INT8, INT4, INT3, INT2 = integer(8), integer(4), integer(3), integer(2)
INT4_SIX_SEVENTHS = integer(4, step=6 / 7)  # the int4 grid stretched to E2M1's largest value, for IF4
# llama.cpp's Q4_0 has the codes -8 to 7 under a scale of either sign: where it is negative, the values -7 to 8.
INT4_DOWN, INT4_UP = integer(4, full=True), integer(4, step=-1.0, full=True)
INT5_DOWN, INT5_UP = integer(5, full=True), integer(5, step=-1.0, full=True)
INT6_DOWN, INT6_UP = integer(6, full=True), integer(6, step=-1.0, full=True)
UINT4, UINT5 = unsigned(4), unsigned(5)
NF4 = table(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

_BLOCKS = {"tensor": (0, 0), "channel": (1, 0), "g32": (1, 32), "g64": (1, 64), "g128": (1, 128)}
_TOKEN = (1, 0)
_BITNET = "BitNet b1.58, arXiv 2402.17764"
_OCP = "OCP Microscaling Formats v1.0"
_MIX = "W8A8_MIX of msmodelslim, for servers with nodes of their own for prompts"
_C8 = "C8 of msmodelslim: cached keys and values, a scale for each channel of each head"
_GGML = "llama.cpp, ggml-common.h"
# What llama.cpp has and nothing here writes.
_MISSING = {"q2_k": "nothing packs its two bits", "q3_k": "nothing packs its three bits"}
_MINIMA: dict[str, Any] = {"block": (1, 32), "scale": U6, "super_block": 256, "minimum": U6_MINIMUM, "source": _GGML}


def _integers() -> list[Format]:
    formats = []
    for element in (INT8, INT4, INT3, INT2):
        for suffix, block in _BLOCKS.items():
            name = f"{element.name}_{suffix}"
            formats.append(Format(name=name, elements=(element,), block=block, scale=BF16))
            formats.append(Format(name=f"{name}_asym", elements=(element,), block=block, scale=BF16, zero_point=True))
        formats.append(Format(name=f"{element.name}_token", elements=(element,), block=_TOKEN, scale=F32))
    return formats


_FORMATS: list[Format] = [
    *_integers(),
    Format(
        name="int8_mix", elements=(INT8,), block=(0, 0), scale=BF16, zero_point=True, prompt="int8_token", source=_MIX
    ),
    Format(name="int8_column", elements=(INT8,), block=(0, 1), scale=BF16, source=_C8),
    Format(name="ternary_channel", elements=(INT2,), block=(1, 0), scale=BF16, scale_rule="mean", source=_BITNET),
    Format(name="ternary_g64", elements=(INT2,), block=(1, 64), scale=BF16, scale_rule="mean", source=_BITNET),
    Format(name="fp8_tensor", elements=(E4M3,), block=(0, 0), scale=BF16, source="OCP FP8"),
    Format(name="fp8_channel", elements=(E4M3,), block=(1, 0), scale=BF16, source="OCP FP8"),
    Format(name="fp8_token", elements=(E4M3,), block=_TOKEN, scale=F32, source="OCP FP8"),
    Format(name="fp8_g128", elements=(E4M3,), block=(1, 128), scale=F32, source="DeepSeek-V3, activations"),
    Format(name="fp8_b128", elements=(E4M3,), block=(128, 128), scale=BF16, source="DeepSeek-V3, weights"),
    Format(name="mxfp8", elements=(E4M3,), block=(1, 32), scale=E8M0, scale_rule="ceil", source=_OCP),
    Format(name="mxfp6", elements=(E2M3,), block=(1, 32), scale=E8M0, scale_rule="even", source=_OCP),
    Format(name="mxfp4", elements=(E2M1,), block=(1, 32), scale=E8M0, scale_rule="even", source=_OCP),
    Format(name="mxint8", elements=(INT8,), block=(1, 32), scale=E8M0, scale_rule="ceil", source="arXiv 2510.25602"),
    Format(name="mxint4", elements=(INT4,), block=(1, 32), scale=E8M0, scale_rule="ceil", source="arXiv 2510.25602"),
    Format(name="nvfp4", elements=(E2M1,), block=(1, 16), scale=UE4M3, global_scale=True, source="NVIDIA NVFP4"),
    Format(name="nvint4", elements=(INT4,), block=(1, 16), scale=UE4M3, global_scale=True, source="arXiv 2510.25602"),
    Format(name="nf4_g64", elements=(NF4,), block=(1, 64), scale=BF16, source="QLoRA, arXiv 2305.14314"),
    Format(name="q4_0", elements=(INT4_DOWN, INT4_UP), block=(1, 32), scale=F16, source=_GGML),
    Format(name="q5_0", elements=(INT5_DOWN, INT5_UP), block=(1, 32), scale=F16, source=_GGML),
    Format(name="q8_0", elements=(INT8,), block=(1, 32), scale=F16, source=_GGML),
    Format(name="q8_k", elements=(INT8,), block=(1, 256), scale=F32, source=f"{_GGML}, inputs of K types"),
    Format(name="q4_k", elements=(UINT4,), **_MINIMA),
    Format(name="q5_k", elements=(UINT5,), **_MINIMA),
    Format(name="q6_k", elements=(INT6_DOWN, INT6_UP), block=(1, 16), scale=S8, super_block=256, source=_GGML),
    Format(
        name="if4",
        elements=(E2M1, INT4_SIX_SEVENTHS),
        block=(1, 16),
        scale=UE4M3,
        global_scale=True,
        source="IF4: E2M1 or INT4 per block, the choice in the scale's sign bit",
    ),
]

CATALOG: dict[str, Format] = {fmt.name: fmt for fmt in _FORMATS}


def lookup(name: str) -> Format:
    """The Format called `name`.

    Raises:
        FormatError: no such format; names the three nearest, or says why one of llama.cpp's is missing.
    """
    if name in _MISSING:
        raise FormatError(f"{name} of llama.cpp cannot be trained yet: {_MISSING[name]}; use q4_0 or q4_k")
    try:
        return CATALOG[name]
    except KeyError:
        raise FormatError(f"no format called {name!r}; nearest: {nearest(name, CATALOG)} (all: qat formats)") from None


def widened(fmt: Format, bits: int) -> Format | None:
    """The integer format of so many bits whose blocks, scales and zero points are those of `fmt`; None where that is no
    integer format, not narrower, or has no such sibling."""
    if not (fmt.is_single and fmt.element.is_integer and fmt.element.bits < bits):
        return None
    rule = "amax" if fmt.scale_rule == "mean" else fmt.scale_rule  # ternary's mean says nothing of more levels
    alike = replace(fmt, name="", elements=(integer(bits),), scale_rule=rule, source="")
    return next((other for other in CATALOG.values() if replace(other, name="", source="") == alike), None)


def register(fmt: Format) -> Format:
    """Add a format for this process only (research variants, tests); the name must be new or mean the same."""
    if CATALOG.setdefault(fmt.name, fmt) != fmt:
        raise FormatError(f"a different format called {fmt.name!r} is in the catalogue already; choose another name")
    return fmt
