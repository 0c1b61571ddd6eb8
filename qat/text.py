"""How counts, shares, sizes, times and lists of names are written, in messages, tables and reports alike."""

from collections.abc import Iterable


def some(names: Iterable[str], most: int = 4, joint: str = ", ") -> str:
    """The first `most` of them, and how many more there are: "a, b and 3 more"."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return joint.join(listed[:most]) + more


def size(count: float) -> str:
    """Bytes in decimal units, for example "134.5 MB"."""
    units = ((1e12, "TB", 2), (1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1))
    unit, name, digits = next((row for row in units if count >= row[0]), (1, "B", 0))
    return f"{count / unit:.{digits}f} {name}"


def percent(share: float) -> str:
    """Whole per cents, with more digits where "0 %" or "100 %" would be untrue."""
    value = 100 * share
    for digits in (0, 1, 2):
        text = f"{value:.{digits}f}"
        if float(text) not in (0.0, 100.0) or float(text) == value:
            return f"{text} %"
    return f"{value:.1e} %" if abs(value) < 1 else f"{value} %"


def duration(seconds: float) -> str:
    """One decimal of the largest unit of which there are two."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"
