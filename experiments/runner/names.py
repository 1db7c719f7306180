"""File names for any text, such as labels of points: different for different texts, and never too long."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from urllib.parse import quote

# Bytes. A file system takes 255; what comes after a label (rate, seed, ".json", process id) takes up to 50,
# and after a lease (host, process id, random digits) up to 90.
_MOST, _CUT = 160, 100


def of_labels(labels: Sequence[str]) -> list[str]:
    """File names of the labels of one study, in order.

    Signs and spaces become "-". Where that makes two labels one, or a name too long, a hash of the label
    tells it from all others. No other name may change: workdirs that are there have their records under it.
    """
    plain = [re.sub(r"[^A-Za-z0-9_.]+", "-", label) for label in labels]
    count = Counter(plain)
    return [
        _hashed(name, label) if count[name] > 1 or len(name) > _MOST else name
        for name, label in zip(plain, labels, strict=True)
    ]


def escaped(name: str) -> str:
    """The name of a point or run as one file name; `urllib.parse.unquote` gives it back unless it was cut."""
    text = quote(name, safe="")
    return _hashed(text, name) if len(text) > _MOST else text


def _hashed(readable: str, text: str) -> str:
    # "~" is in no plain name, so that none is that of another label.
    return f"{readable[:_CUT]}~{hashlib.sha256(text.encode()).hexdigest()[:12]}"
