"""Numbers as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Format a number of bytes in units of 1000, as `--bytes` takes it.

    >>> size(597), size(1234), size(499_000), size(2_500_000_000)
    ('597 B', '1.2 kB', '0.50 MB', '2.50 GB')
    """
    if count < 1e3:
        return f"{count:.0f} B"
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def score(value: float | None) -> str:
    """Format a similarity with four decimals; '-' for none."""
    return "-" if value is None else f"{value:.4f}"
