"""How the trials of a part are counted."""

import collections
from collections.abc import Iterator


def count(what: str, trials: Iterator[tuple[bool, str]]) -> bool:
    """Prints how many of the trials went well, what did not, and in how many of each kind there were."""
    good, kinds = [], collections.Counter[str]()
    for ok, kind in trials:
        good.append(ok)
        kinds[kind] += 1
        if not ok:
            print(f"  NOT: {what}: {kind}", flush=True)
    listed = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    print(f"{what}: {sum(good)} of {len(good)} ({listed})", flush=True)
    return all(good)
