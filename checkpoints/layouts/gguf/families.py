"""The architectures that are written: what llama.cpp calls them, what it wants done to their tensors, and the settings
that it reads of them. Each is compared with llama.cpp's own converter (see `tests/engines/test_llama_cpp.py`);
what is not here is refused by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, GGUFWriter, RopeScalingType
from torch import Tensor

from qat.errors import UnsupportedError

Settings = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What is special about one `model_type`.

    Attributes:
        arch: llama.cpp's name.
        permuted: whether rows of query and key change places: llama.cpp rotates neighbouring channels of a head,
            transformers one of the first half with one of the second.
        shifted: whether norms multiply with one more than their weight, which the file holds added up.
        spaced: whether its tokenizers of pieces put a space before text, where they do not say; they must do so.
        ropes: kinds of rotation that it has.
        sized: whether the file says how wide a head is, where the configuration does.
        mlp_scales: whether llama.cpp multiplies products of its MLP with the scales above their weights.
        joined: whether tokens that tokenizer.json adds replace pieces of tokenizer.model, too.
        describe: adds settings beyond the usual ones.
        notes: says what llama.cpp does otherwise with some texts.
        check: says why a configuration cannot be expressed, or "".
    """

    arch: MODEL_ARCH
    permuted: bool = False
    shifted: bool = False
    spaced: bool = True
    ropes: tuple[str, ...] = ("default", "linear", "yarn", "llama3")
    sized: bool = True
    mlp_scales: bool = False
    joined: bool = False
    describe: Callable[[GGUFWriter, Settings], None] = lambda writer, settings: None
    notes: Callable[[Settings], list[str]] = lambda settings: []
    check: Callable[[Settings], str] = lambda settings: ""


def _llama(writer: GGUFWriter, settings: Settings) -> None:
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_rope_dimension_count(_head(settings))


def _llama_check(settings: Settings) -> str:
    window = settings.get("sliding_window")
    if window is not None and window < settings["max_position_embeddings"]:
        return f"sliding_window {window}, which llama.cpp's llama architecture does not have"
    return ""


def _qwen_check(settings: Settings) -> str:
    return "use_sliding_window, which llama.cpp ignores" if settings.get("use_sliding_window") else ""


def _moe(writer: GGUFWriter, settings: Settings) -> None:
    writer.add_expert_feed_forward_length(settings["moe_intermediate_size"])


def _moe_check(settings: Settings) -> str:
    dense = settings.get("mlp_only_layers") or settings.get("decoder_sparse_step", 1) != 1
    if not settings.get("norm_topk_prob"):
        return "norm_topk_prob: false, which llama.cpp takes for true"
    return "layers without experts, which llama.cpp does not have" if dense else _qwen_check(settings)


def _gemma2(writer: GGUFWriter, settings: Settings) -> None:
    writer.add_attn_logit_softcapping(settings["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(settings["final_logit_softcapping"])
    writer.add_sliding_window(settings["sliding_window"])


def _gemma3(writer: GGUFWriter, settings: Settings) -> None:
    writer.add_rope_freq_base_swa(settings["rope_parameters"]["sliding_attention"]["rope_theta"])
    if settings.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(settings["final_logit_softcapping"])
    writer.add_sliding_window(settings["sliding_window"])


def _gemma_check(period: int, large: int) -> Callable[[Settings], str]:
    """Of a family whose every `period`-th layer sees all positions, and whose model of `large` layers is scaled by the
    share of a head in the width."""

    def check(settings: Settings) -> str:
        layers, scalar = settings["num_hidden_layers"], settings["query_pre_attn_scalar"]
        kinds = ["full_attention" if not (i + 1) % period else "sliding_attention" for i in range(layers)]
        scale = _head(settings) if layers != large else settings["hidden_size"] // settings["num_attention_heads"]
        local = _rope(settings, "sliding_attention").get("rope_type", "default")
        capped = settings.get("attn_logit_softcapping") is not None
        problems = {
            "other layer_types than llama.cpp's": settings["layer_types"] != kinds,
            f"query_pre_attn_scalar {scalar}, for which llama.cpp has {scale}": scalar != scale,
            f"rope_type {local!r} in sliding attention": local != "default",
            "a head of its own": not settings["tie_word_embeddings"],
            "attn_logit_softcapping, which llama.cpp's gemma3 does not have": capped and period != 2,
            "no attn_logit_softcapping, which llama.cpp's gemma2 has": not capped and period == 2,
            "no final_logit_softcapping, which llama.cpp's gemma2 has": (
                period == 2 and settings.get("final_logit_softcapping") is None
            ),
            "use_bidirectional_attention": bool(settings.get("use_bidirectional_attention")),
            "attention_bias": bool(settings.get("attention_bias")),
            f"hidden_activation {settings['hidden_activation']}": settings["hidden_activation"] != "gelu_pytorch_tanh",
        }
        return next((problem for problem, found in problems.items() if found), "")

    return check


def _phi3(writer: GGUFWriter, settings: Settings) -> None:
    rope = _rope(settings)
    writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
    writer.add_rope_dimension_count(_rotated(settings))
    writer.add_sliding_window(settings.get("sliding_window") or 0)
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_attn_factors(_attention_factor(settings))


def _rotated(settings: Settings) -> int:
    """How many channels of a head are rotated."""
    return int(_head(settings) * _rope(settings).get("partial_rotary_factor", 1.0))


def _attention_factor(settings: Settings) -> float:
    """What LongRoPE multiplies sines and cosines with: the model's own, or what follows from its stretch."""
    rope, old = _rope(settings), settings["original_max_position_embeddings"]
    stretched = rope.get("factor") or settings["max_position_embeddings"] / old
    usual = math.sqrt(1 + math.log(stretched) / math.log(old)) if stretched > 1 else 1.0
    own = rope.get("attention_factor")
    return float(usual if own is None else own)


def _phi3_notes(settings: Settings) -> list[str]:
    window, known, notes = settings.get("sliding_window"), settings["max_position_embeddings"], []
    if window and window < known:
        notes.append(f"llama.cpp lets phi3 see all of a text where this model sees the last {window} tokens of it")
    if _rope(settings).get("rope_type") == "longrope" and settings["original_max_position_embeddings"] < known:
        notes.append(
            f"llama.cpp takes LongRoPE's long factors where its context (--ctx-size) has more than "
            f"{settings['original_max_position_embeddings']} positions, this model where a text has"
        )
    return notes


def _phi3_check(settings: Settings) -> str:
    heads, width, rotated = settings["num_attention_heads"], settings["hidden_size"], _rotated(settings)
    if width != heads * _head(settings):
        return f"head_dim {_head(settings)}, for which llama.cpp's phi3 has hidden_size / num_attention_heads"
    if rotated % 2 or not rotated:
        return f"{rotated} rotated channels of a head, which llama.cpp takes in pairs"
    return ""


FAMILIES: dict[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, permuted=True, mlp_scales=True, describe=_llama, check=_llama_check),
    "mistral": Family(MODEL_ARCH.LLAMA, permuted=True, mlp_scales=True, describe=_llama, check=_llama_check),
    "qwen2": Family(MODEL_ARCH.QWEN2, check=_qwen_check),
    "qwen3": Family(MODEL_ARCH.QWEN3, mlp_scales=True, check=_qwen_check),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, mlp_scales=True, describe=_moe, check=_moe_check),
    "phi3": Family(
        MODEL_ARCH.PHI3,
        ropes=("default", "longrope"),
        sized=False,
        joined=True,
        describe=_phi3,
        notes=_phi3_notes,
        check=_phi3_check,
    ),
    "gemma2": Family(MODEL_ARCH.GEMMA2, shifted=True, spaced=False, describe=_gemma2, check=_gemma_check(2, 46)),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, shifted=True, spaced=False, describe=_gemma3, check=_gemma_check(6, 62)),
}


def find(model_type: str) -> Family:
    """The family called `model_type`.

    Raises:
        UnsupportedError: llama.cpp does not know it, or its mapping was not tested here.
    """
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"GGUF files of {model_type!r} are not written: no tested mapping; there are {known}")
    return FAMILIES[model_type]


def check(family: Family, settings: Settings) -> None:
    """Refuse what a file could not say.

    Raises:
        UnsupportedError: names the setting.
    """
    kind, activation = _rope(settings).get("rope_type", "default"), settings.get("hidden_act", "silu")
    unknown = "" if kind in family.ropes else f"rope_type {kind!r}; known: {', '.join(family.ropes)}"
    silu = activation == "silu" or "hidden_activation" in settings  # which Gemma has, and checks itself
    other = "" if silu else f"hidden_act {activation!r}, for which llama.cpp has silu"
    reason = family.check(settings) or unknown or other
    if reason:
        raise UnsupportedError(f"the model has {reason}; nothing was written")


_USUAL_BASE = 10000.0  # of a file that says none; llama.cpp's converter has no word of it for Gemma 2


def _head(settings: Settings) -> int:
    own = settings.get("head_dim")
    return int(own if own is not None else settings["hidden_size"] // settings["num_attention_heads"])


def _rope(settings: Settings, kind: str = "full_attention") -> Settings:
    """Of a kind of layers, where they differ."""
    rope: Settings = settings.get("rope_parameters") or {}
    own: Settings = rope.get(kind, rope)
    return own


def describe(writer: GGUFWriter, family: Family, settings: Settings) -> None:
    """What llama.cpp reads of any architecture, then what is special about one."""
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    _describe_rope(writer, _rope(settings))
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    if (experts := settings.get("num_experts", settings.get("num_local_experts"))) is not None:
        writer.add_expert_count(experts)
    if (used := settings.get("num_experts_per_tok")) is not None:
        writer.add_expert_used_count(used)
    if settings.get("head_dim") is not None and family.sized:
        writer.add_key_length(settings["head_dim"])
        writer.add_value_length(settings["head_dim"])
    family.describe(writer, settings)


def _describe_rope(writer: GGUFWriter, rope: Settings) -> None:
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    unsaid = writer.arch == MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA2] and rope.get("rope_theta") == _USUAL_BASE
    if rope.get("rope_theta") is not None and not unsaid:
        writer.add_rope_freq_base(rope["rope_theta"])


def rope_factors(settings: Settings) -> dict[str, Tensor]:
    """What llama.cpp divides the frequencies by, as its tensors are called: of Llama 3's scaling, for all texts; of
    LongRoPE's two kinds, of which it takes one by the length of its context; none for others."""
    rope = _rope(settings)
    if rope.get("rope_type") == "longrope":
        kinds = {MODEL_TENSOR.ROPE_FACTORS_LONG: "long_factor", MODEL_TENSOR.ROPE_FACTORS_SHORT: "short_factor"}
        return {_name(kind): torch.tensor(rope[key], dtype=torch.float32) for kind, key in kinds.items()}
    return {_name(MODEL_TENSOR.ROPE_FREQS): _llama3_factors(settings)} if rope.get("rope_type") == "llama3" else {}


def _name(kind: MODEL_TENSOR) -> str:
    return TENSOR_NAMES[kind] + ".weight"


def _llama3_factors(settings: Settings) -> Tensor:
    rope = _rope(settings)
    old, factor, width = rope["original_max_position_embeddings"], rope["factor"], _head(settings)
    low, high = old / rope["low_freq_factor"], old / rope["high_freq_factor"]
    waves = 2 * math.pi / (1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    share = (old / waves - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    between = 1 / ((1 - share) / factor + share)
    return torch.where(waves < high, 1.0, torch.where(waves > low, float(factor), between)).to(torch.float32)


def row_order(name: str, rows: int, family: Family, settings: Settings) -> Tensor | None:
    """Which row of transformers' tensor each row of the file is, or None where none moves.

    Args:
        name: of a weight or bias in transformers.
    """
    role = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": settings["num_attention_heads"], "k_proj": settings["num_key_value_heads"]}.get(role)
    if not family.permuted or heads is None:
        return None
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
