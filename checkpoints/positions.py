"""How many positions a model can compute, and for how many it was made: what bounds the texts it is given."""

from typing import Any

from torch import nn

from qat.families import find_family

_SCALED = ("linear", "dynamic", "yarn")  # kinds of rotary scaling whose configs state the length before it


def most_positions(model: nn.Module) -> int | None:
    """The longest text that a model should be given; None where nothing limits it."""
    return min((n for n in (table_positions(model), known_positions(model)) if n is not None), default=None)


def table_positions(model: nn.Module) -> int | None:
    """How many positions a model can compute at most; None where nothing limits it.

    Positions are limited by tables: learned ones (an embedding, which OPT begins at row 2) and precomputed ones.
    """
    config: Any = model.config
    tokens_in: Any = model.get_input_embeddings()  # type: ignore[operator]  # a transformers method
    text, family = _around(model, tokens_in), find_family(config.model_type)
    counts = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in text.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens_in and family.holds_positions(name)
    ]
    for path, module in text.named_modules():
        if not hasattr(module, "make_weights"):  # a table that grows (XGLM)
            buffers = module.named_buffers(path, recurse=False)
            tables = [buffer for name, buffer in buffers if buffer.ndim == 2 and family.holds_positions(name)]
            counts += [len(table) for table in tables if len(table) > 1]
    if family.positions_key is not None:
        counts.append(int(getattr(config, family.positions_key)))
    return min(counts, default=None)


def _around(model: nn.Module, embedding: nn.Module) -> nn.Module:
    """What reads text: the module that holds the embedding; the towers beside it have positions of their own."""
    path = next((path for path, module in model.named_modules() if module is embedding), "")
    return model.get_submodule(path.rpartition(".")[0])


def known_positions(model: nn.Module) -> int | None:
    """How many positions a model was made for; None where it does not say, or uses none (ALiBi, recurrence)."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]  # a transformers config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or getattr(config, "alibi", False):
        return None
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rotary.get("rope_type") in _SCALED:
        before = rotary.get("original_max_position_embeddings") or limit
        return max(limit, int(before * float(rotary.get("factor") or 1)))
    return limit
