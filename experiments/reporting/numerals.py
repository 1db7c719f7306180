"""Numbers as they are written: learning rates as powers of two, and which cells of a table are numbers."""

import math
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\W{0,3}\d[^a-z]*([kMGTPE]|[a-z%]{1,3})?[\W\d]*(\([a-z]+\))?$", re.IGNORECASE)
_RAISED = str.maketrans("-0123456789.", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹·")


def rate(value: float) -> str:
    """Formats a learning rate: as a power of two, "2⁻⁸", if its exponent is a multiple of a half."""
    if value > 0 and abs((halves := 2 * math.log2(value)) - round(halves)) < 1e-6:
        return "2" + f"{round(halves) / 2:g}".translate(_RAISED)
    return f"{value:.3g}"


def near_rate(value: float) -> str:
    """Formats a learning rate with the power of two that it is, or is about."""
    if (exact := rate(value)).startswith("2") and not exact[1].isascii():
        return f"{value:.3g} = {exact}"
    return f"{value:.3g} ≈ 2" + f"{math.log2(value):.1f}".translate(_RAISED)


def are_numbers(cells: Sequence[str]) -> bool:
    """True if all cells are numbers, with a unit, an interval or a remark, or short words in their place."""
    words = [cell for cell in cells if not _NUMBER.match(cell)]
    return len(words) < len(cells) and all(re.fullmatch(r"[a-z ]{0,10}", word) for word in words)
