"""How a benchmark measures: all sides in turn, in one run, and ratios within each turn.

What else a shared machine does then falls on all sides alike; the spread over the turns says how much of it
is left.
"""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a part's table.

    Attributes:
      name: what was measured, and of which side: "125M, float32: ours / PyTorch".
      unit: of the values; "x" for ratios, "%" for shares in percent.
      values: one for each turn; a single one where there is nothing to repeat.
      at_least, at_most: the target for their median, if there is one.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the target; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.median <= high

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes and the median."""
        return {**dataclasses.asdict(self), "values": list(self.values), "median": self.median}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Line":
        """Returns the line that `to_json` gave."""
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**fields, "values": tuple(fields["values"])})


def alternate(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Returns the seconds of every call: each side once in each turn, after one call of each to warm up.

    Every other turn goes backwards, so that no side always follows the same one. What a side calls has to
    wait for its own work to be done, with `jax.block_until_ready` for instance.
    """
    for call in sides.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        names = list(sides)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def process(name: str, module: str, *arguments: str) -> Iterator[Callable[[], None]]:
    """Yields a side whose work is done by `python -m module arguments`, which waits while others work.

    The process takes its turn for every line on stdin, and answers "done".
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        stdin, stdout = server.stdin, server.stdout
        assert stdin is not None
        assert stdout is not None

        def ask() -> None:
            stdin.write("go\n")
            stdin.flush()
            if stdout.readline() != "done\n":
                raise RuntimeError(f"the process of {name} ended early; its output is above")

        try:
            yield ask
        finally:
            server.kill()


def ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
    """Returns a / b of each turn."""
    return tuple(x / y for x, y in zip(a, b, strict=True))


def rates(amount: float, seconds: Sequence[float]) -> tuple[float, ...]:
    """Returns `amount` per second of each turn."""
    return tuple(amount / s for s in seconds)


def columns(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Returns the table: name, median, smallest and largest, target."""
    return {
        "": [line.name for line in lines],
        "median": [f"{_number(line.median)} {line.unit}" for line in lines],
        "from .. to": [
            f"{_number(min(line.values))} .. {_number(max(line.values))}" if len(line.values) > 1 else ""
            for line in lines
        ],
        "target": [_target(line) for line in lines],
    }


def _target(line: Line) -> str:
    bounds = [
        f"at {word} {_number(bound)}"
        for word, bound in (("least", line.at_least), ("most", line.at_most))
        if bound is not None
    ]
    return f"{' and '.join(bounds)}: {'met' if line.is_met else 'MISSED'}" if bounds else ""


def _number(value: float) -> str:
    """Returns a number with three significant digits, or all of its integer digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
