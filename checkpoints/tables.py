"""Quantized embeddings in an export: which of them are packed, and which output layers need no tensors of their own
then. A table that is not packed is stored as the BF16 values of its grid, which every loader reads."""

from collections.abc import Sequence

from qat.errors import UnsupportedError
from qat.sites import Site


def packed_sites(
    quantized: Sequence[Site], pack_tables: bool, any_input: bool = False
) -> tuple[list[Site], list[Site], dict[str, str]]:
    """The weights of a model sorted: those to pack, tables that stay dense, and by the path of each head that shares
    the packed tensors of a table the path of that; `any_input` where the layout says nothing of inputs.

    Raises:
        UnsupportedError: no layer is quantized, or no table where tables are to be packed.
    """
    tables, linears = ([site for site in quantized if site.is_table is kind] for kind in (True, False))
    if not linears:
        raise UnsupportedError("no linear layer of this model is quantized; apply a scheme first (qat.apply)")
    if not pack_tables:
        return linears, tables, {}
    if not tables:
        raise UnsupportedError(
            "no embedding of this model is quantized, so there is no table to pack: leave --pack-tables out, or train "
            "with a rule for it, such as {match: model.embed_tokens, weight: int8_channel}"
        )
    shared = {head.path: table.path for table in tables for head in linears if _is_shared(head, table, any_input)}
    return [*tables, *(site for site in linears if site.path not in shared)], [], shared


def _is_shared(head: Site, table: Site, any_input: bool) -> bool:
    """Whether an output layer multiplies with the very codes of a table, and does nothing else."""
    one = head.quantizer is table.quantizer and head.weight is table.weight
    return one and (any_input or head.input is None) and getattr(head.owner, "bias", None) is None
