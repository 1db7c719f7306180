"""Timing of benchmarks: all sides in turn, in one run, and ratios within each turn.

Other load on a shared machine then affects all sides alike; the spread over the turns shows the rest of it.
"""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.reporting import tables


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a part's table.

    Attributes:
      name: the quantity and the side: "125M, float32: ours / PyTorch".
      unit: of the values; "x" for ratios, "%" for shares in percent.
      values: one for each turn; a single one if nothing is repeated.
      at_least, at_most: bounds of the target for their median, or None.
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
        """True if the median meets the target; None without a target."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.median <= high

    def to_json(self) -> dict[str, Any]:
        """Converts to a JSON object of the attributes and the median."""
        return {**dataclasses.asdict(self), "values": list(self.values), "median": self.median}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Line":
        """Inverse of `to_json`."""
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**fields, "values": tuple(fields["values"])})


def alternate(sides: Mapping[Any, Callable[[], Any]], turns: int) -> dict[Any, list[float]]:
    """Times every side once in each turn, after one warm-up call of each: seconds, by side.

    Every other turn is in reverse order, so that no side always follows the same one. A side must block until
    its work is done, for instance with `jax.block_until_ready`.
    """
    for call in sides.values():
        call()
    seconds: dict[Any, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        names = list(sides)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def process(name: str, module: str, *arguments: str) -> Iterator[Callable[[], str]]:
    """Yields a side that runs in a process, `python -m module arguments`, which is idle in other turns.

    The process takes a turn for every line on stdin, and prints "done", with what the side is to return.
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        stdin, stdout = server.stdin, server.stdout
        assert stdin is not None
        assert stdout is not None

        def ask() -> str:
            stdin.write("go\n")
            stdin.flush()
            answer = stdout.readline()
            if not answer.startswith("done"):
                raise RuntimeError(f"the process of {name} ended early; its output is above")
            return answer.removeprefix("done")

        try:
            yield ask
        finally:
            server.kill()


def ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
    """Computes a / b for each turn."""
    return tuple(x / y for x, y in zip(a, b, strict=True))


def rates(amount: float, seconds: Sequence[float]) -> tuple[float, ...]:
    """Computes `amount` per second for each turn."""
    return tuple(amount / s for s in seconds)


def columns(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Table of the lines: name, median, smallest and largest, target."""
    return {
        "": [line.name for line in lines],
        "median": [f"{_number(line.median)} {line.unit}" for line in lines],
        "from .. to": [
            f"{_number(min(line.values))} .. {_number(max(line.values))}" if len(line.values) > 1 else ""
            for line in lines
        ],
        "target": [_target(line) for line in lines],
    }


_QUICK = ", quick, so that the numbers mean nothing"


def table(record: dict[str, Any]) -> list[str]:
    """The table of one record, with the machine above it."""
    lines = [Line.from_json(line) for line in record["lines"]]
    device, versions = record["device"], record["versions"]
    machine = f"{device['count']} x {device['kind']}, {device['cores']} cores"
    title = titled(record) + _QUICK * bool(record.get("quick"))
    return [
        "",
        f"{title}: {machine}, jax {versions['jax']}, {record['created'][:10]}",
        "",
        *tables.markdown_table(columns(lines)).splitlines(),
    ]


def titled(record: dict[str, Any]) -> str:
    """The part of the benchmark, and the label that the record was given."""
    return ", ".join(filter(None, [record["part"], record.get("label")]))


def _target(line: Line) -> str:
    bounds = [
        f"at {word} {_number(bound)}"
        for word, bound in (("least", line.at_least), ("most", line.at_most))
        if bound is not None
    ]
    return f"{' and '.join(bounds)}: {'met' if line.is_met else 'MISSED'}" if bounds else ""


def _number(value: float) -> str:
    """Formats a number with three significant digits, or all of its integer digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
