"""Which prompts the kernel of `qat::prompt_attention` takes."""

WIDEST = 128  # columns of a head: 127 x 127 of each are less than 2^22
LEAST = 16


def problem(width: int, value_width: int, query_heads: int, heads: int) -> str | None:
    """Why the kernel does not take heads of so many columns, so many of queries and of keys, or None."""
    if max(width, value_width) > WIDEST or min(width, value_width) < LEAST:
        return f"the kernel takes heads of {LEAST} to {WIDEST} columns, not {width} and {value_width}"
    if query_heads % max(heads, 1):
        return f"{query_heads} heads of queries are no multiple of {heads} of keys"
    return None
