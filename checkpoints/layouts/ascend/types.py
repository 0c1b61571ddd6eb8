"""The types of Ascend checkpoints (msmodelslim's, read by vllm-ascend, SGLang and MindIE): which pair of formats each
is, its tensors, and who loads it. The writer, the reader, refusals before training and docs/ascend.md go by this table.

Shapes are words: n rows (outputs), k columns (inputs), g the columns that share a scale. The tensors are those that
msmodelslim 26.1 writes and vllm-ascend's scheme classes ask for; the sources are named in docs/ascend.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qat.checkpoints.layouts.kinds import ROW, TENSOR, int_input, int_weight, mx
from qat.checkpoints.layouts.npu import A2_A3, A5, A310P, ENGINES, Npu
from qat.checkpoints.layouts.support import Applies
from qat.numbers.catalog import E2M1, E4M3, INT4, INT8, lookup
from qat.numbers.element import Element
from qat.numbers.format import Format
from qat.numbers.scale import BF16

Spec = tuple[str, str]  # safetensors type, and shape in words
INT4_BITS, INT8_BITS = INT4.bits, INT8.bits

FLOAT = "FLOAT"
"""What the description says of a tensor that is not quantized."""


@dataclass(frozen=True)
class Type:
    """One type.

    Attributes:
        name: in `quant_model_description.json`.
        applies: which (weight, input) formats it holds.
        element, group: of the weights, and the columns that share a scale (0: a row).
        input: what shares a scale of inputs ("tensor", "token", "group"), "" where they are not quantized.
        input_element: of inputs.
        tensors: what is stored of a layer, by its name below the layer's path.
        npu: who loads it.
        experts: whether vllm-ascend runs it in the matrices of experts, too.
        pads: whether vllm-ascend makes pairs of an odd number of a row's groups. It does not for experts.
        unbiased: why no layer that adds a bias can have it, "" where one can.
        experts_only: why nothing but experts can have it, "" where other layers can.
    """

    name: str
    applies: Applies
    element: Element
    group: int
    input: str
    input_element: Element
    tensors: Mapping[str, Spec]
    npu: tuple[Npu, ...]
    experts: bool = False
    pads: bool = True
    unbiased: str = ""
    experts_only: str = ""

    @property
    def is_static(self) -> bool:
        """Whether the input's scale and offset are stored."""
        return "input_offset" in self.tensors

    @property
    def packed(self) -> bool:
        """Whether two neighbours of a row share a byte."""
        return self.tensors["weight"][1] == "n k/2"

    @property
    def pairs_rows(self) -> bool:
        """Whether two neighbours of a column do."""
        return self.tensors["weight"][1] == "n/2 k"

    @property
    def is_mx(self) -> bool:
        """Whether groups have powers of two as scales."""
        return self.group > 0 and not self.element.is_integer

    def specs(
        self, rows: int, columns: int, half: bool = False, path: str = ""
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor of a layer (rows, columns) at `path`; of FP16 models with `half`."""
        own = {**self.tensors, **(IN_HALF if half and self.is_static else {})}
        own |= SECOND if "scale_bias" in own and is_second(path) else {}
        return {name: (code, shape(words, rows, columns, self.group)) for name, (code, words) in own.items()}


SLICES = 16  # of k, which ranks divide among them
SECOND: Mapping[str, Spec] = {"scale_bias": ("F32", f"n {SLICES}")}


def is_second(path: str) -> bool:
    """Whether a matrix of experts stands behind their gate: ranks of a server divide its columns."""
    return path.rpartition(".")[2] in ("down_proj", "w2")


def shape(words: str, rows: int, columns: int, group: int) -> tuple[int, ...]:
    """A shape in words as numbers; what does not divide is rounded up, so that it fits no tensor of an odd layer."""
    sizes = {"n": rows, "k": columns, "g": group}
    return tuple(
        math.ceil(_number(over, sizes) / _number(under or "1", sizes)) for over, under in map(_cut, words.split())
    )


def _cut(word: str) -> tuple[str, str]:
    over, _, under = word.partition("/")
    return over, under


def _number(word: str, sizes: Mapping[str, int]) -> int:
    return sizes[word] if word in sizes else int(word)


def affine_input(fmt: Format | None) -> bool:
    """8-bit integers with a scale and a zero point for the whole tensor."""
    integer = fmt is not None and fmt.is_single and fmt.element == INT8 and fmt.zero_point
    return fmt is not None and integer and fmt.block == TENSOR and fmt.scale is BF16 and not fmt.prompt


def mixed_input(fmt: Format | None) -> bool:
    """The same for answers, and a scale per token for prompts."""
    return fmt is not None and fmt.prompt != "" and int_input(lookup(fmt.prompt), ROW, INT8_BITS)


def _channel(weight: Format, bits: int) -> bool:
    return int_weight(weight, bits) and weight.block == ROW


def _group(weight: Format, bits: int, group: int) -> bool:
    return int_weight(weight, bits, zero_point=weight.zero_point) and weight.group == group


_VLLM, _SGLANG, _MINDIE = ENGINES
_MINDIE_KEY = "MindIE also reads `quantize` in config.json, which is written"
_DECODES = (
    "vllm-ascend rounds inputs as answers only on a node that receives keys and values from another "
    "(kv_transfer_config), and as prompts everywhere else"
)
_GROUPS = (
    "MindIE has groups of 64 and 128, one size for a model; classes of it that build their graph in Python "
    "(modeling_atb.py) take 128 only"
)
_PER_TOKEN = (
    "on 310p vllm-ascend calls npu_quant_matmul with scales per token, which torch_npu's documents (6.0 to 7.0) say it "
    "does not take there, and its code notes a loss of accuracy; W8A8 has neither"
)
_DENSE = "SGLang's loader has no experts of W4A4_MXFP4 and W4A8_MXFP; it has those of W8A8_MXFP8"
_ODD = "layers of W4A4_MXFP4 with an odd number of groups in a row load from 0.30.0rc2 on"
_ROW_SCALES = {"weight": ("I8", "n k"), "weight_scale": ("F32", "n 1"), "weight_offset": ("F32", "n 1")}
_STATIC: dict[str, Spec] = {
    "weight": ("I8", "n k"),
    "input_scale": ("F32", "1"),
    "input_offset": ("F32", "1"),
    "quant_bias": ("I32", "n"),
    "deq_scale": ("F32", "n"),
}
IN_HALF: dict[str, Spec] = {"deq_scale": ("I64", "n")}
"""What a static type stores otherwise in FP16 models: a float32 number in the low 32 bits of an integer."""
_MX_SCALES: dict[str, Spec] = {"weight_scale": ("U8", "n k/g")}


def _w4a16(group: int) -> Type:
    """INT4 in groups, with or without an offset, under inputs that are not quantized."""
    return Type(
        "W4A16",
        lambda w, a: _group(w, INT4_BITS, group) and a is None,
        INT4,
        group,
        "",
        INT4,
        {"weight": ("I8", "n/2 k"), "weight_scale": ("F32", "n k/g"), "weight_offset": ("F32", "n k/g")},
        (Npu(_MINDIE, A2_A3, remark=_GROUPS),),
    )


TYPES: tuple[Type, ...] = (
    Type(
        "W8A8_DYNAMIC",
        lambda w, a: _channel(w, INT8_BITS) and int_input(a, ROW, INT8_BITS),
        INT8,
        0,
        "token",
        INT8,
        _ROW_SCALES,
        (
            Npu(_VLLM, A2_A3),
            Npu(_VLLM, A310P, remark=_PER_TOKEN),
            Npu(_SGLANG, A2_A3),
            Npu(_MINDIE, A2_A3, remark=_MINDIE_KEY),
        ),
        experts=True,
    ),
    Type(
        "W8A8",
        lambda w, a: _channel(w, INT8_BITS) and (int_input(a, TENSOR, INT8_BITS) or affine_input(a)),
        INT8,
        0,
        "tensor",
        INT8,
        _STATIC,
        (Npu(_VLLM, (*A2_A3, *A310P)), Npu(_SGLANG, A2_A3), Npu(_MINDIE, A2_A3, remark=_MINDIE_KEY)),
    ),
    Type(
        "W8A8_MIX",
        lambda w, a: _channel(w, INT8_BITS) and mixed_input(a),
        INT8,
        0,
        "mix",
        INT8,
        {**_STATIC, **_ROW_SCALES},
        (Npu(_VLLM, A2_A3, remark=_DECODES),),
    ),
    Type(
        "W8A16",
        lambda w, a: _channel(w, INT8_BITS) and a is None,
        INT8,
        0,
        "",
        INT8,
        _ROW_SCALES,
        (Npu(_VLLM, A2_A3), Npu(_MINDIE, A2_A3, remark=_MINDIE_KEY)),
    ),
    _w4a16(64),
    _w4a16(128),
    Type(
        "W4A4_DYNAMIC",
        lambda w, a: _channel(w, INT4_BITS) and int_input(a, ROW, INT4_BITS),
        INT4,
        0,
        "token",
        INT4,
        _ROW_SCALES,
        (Npu(_VLLM, A2_A3, remark="vllm-ascend's W4A4_DYNAMIC product comes out in FP16, whatever the model's type"),),
    ),
    Type(
        "W8A8_MXFP8",
        lambda w, a: mx(w, E4M3) and mx(a, E4M3),
        E4M3,
        32,
        "group",
        E4M3,
        {"weight": ("F8_E4M3", "n k"), **_MX_SCALES},
        (Npu(_VLLM, A5), Npu(_SGLANG, A5)),
        experts=True,
    ),
    Type(
        "W4A4_MXFP4",
        lambda w, a: mx(w, E2M1) and mx(a, E2M1),
        E2M1,
        32,
        "group",
        E2M1,
        {"weight": ("U8", "n k/2"), **_MX_SCALES},
        (Npu(_VLLM, A5, remark=_ODD), Npu(_SGLANG, A5, remark=_DENSE, experts=False)),
        experts=True,
    ),
    Type(
        "W4A8_MXFP",
        lambda w, a: mx(w, E2M1) and mx(a, E4M3),
        E2M1,
        32,
        "group",
        E4M3,
        {"weight": ("U8", "n k/2"), **_MX_SCALES},
        (Npu(_VLLM, A5), Npu(_SGLANG, A5, remark=_DENSE, experts=False)),
        experts=True,
        pads=False,
        unbiased="vllm-ascend gives the product a bias of one dimension, which torch_npu (2.14.0) refuses there",
    ),
    Type(
        "W4A8_DYNAMIC",
        lambda w, a: _channel(w, INT4_BITS) and int_input(a, ROW, INT8_BITS),
        INT4,
        0,
        "token",
        INT8,
        {**_ROW_SCALES, "weight": ("I8", "n/2 k"), "scale_bias": ("F32", "n 1")},
        (Npu(_VLLM, A2_A3, remark="Only experts can be W4A8_DYNAMIC; dense layers are refused"),),
        experts=True,
        experts_only="vllm-ascend has taken its loader for dense layers out (0.30)",
    ),
)

BY_NAME: dict[str, Type] = {}
"""Of types that come in several group sizes, the smallest."""
for _kind in TYPES:
    BY_NAME.setdefault(_kind.name, _kind)

LEFT_OUT: dict[str, str] = {
    "W8A8SC": "its compressor is a program linked to CANN, and the codes are made per tensor-parallel rank",
    "FAQuant": "vllm-ascend quantizes only the keys of multi-head latent attention so, under another name",
    "WFP8AFP8_DYNAMIC": "no engine loads it: vllm-ascend knows another name for such layers",
    "W4A8_DYNAMIC (dense)": "vllm-ascend has taken its loader for dense layers out (0.30)",
}
"""Types of the same family that are not written, and why."""


def type_called(name: str, group: int) -> Type | None:
    """The type that a description with that group size means by a name, or None."""
    kinds = [kind for kind in TYPES if kind.name == name]
    return kinds[0] if len(kinds) == 1 else next((kind for kind in kinds if kind.group == group), None)


def find_type(weight: Format, input: Format | None) -> Type | None:
    """The type that holds a pair of formats, or None."""
    return next((kind for kind in TYPES if kind.applies(weight, input)), None)
