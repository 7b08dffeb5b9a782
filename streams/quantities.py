"""Numbers as people read them: counts, bytes and durations in three figures or so."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """940, 12.3k, 1.20M, 10.0M; inf."""
    return _scaled(value, ("", "k", "M", "G", "T"))


def rounded(value: float) -> str:
    """As `count`, without zeros at the end: 10M, 2.5k; for the ticks of an axis."""
    text = count(value)
    digits, unit = text.rstrip("kMGT"), text.lstrip("-0123456789.")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit


def size(num_bytes: float) -> str:
    """512 B, 1.20 GB; decimal prefixes, as on a disk."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def duration(seconds: float) -> str:
    """8 s, 4 min 5 s, 1 h 2 min."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value) or abs(value) < 1000:
        return f"{value:.0f}{units[0]}"
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:  # 999.6k would be printed as 1000k
        value /= 1000
        power += 1
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{units[power]}"
