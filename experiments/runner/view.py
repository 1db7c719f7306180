"""What a person sees of a sweep: a live block on a terminal, plain lines in a log."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from mobilellm_jax.training import signals
from mobilellm_jax.training.progress import duration

_REFRESH_PER_S = 2  # a refresh takes 2 ms


@dataclasses.dataclass(frozen=True)
class Event:
    """What a worker tells of a run or a point.

    Attributes:
      name: of the run or the point.
      line: what there is to say.
      share: of the steps of the run that are done, where the line is about a step; times the number of runs
        that train together.
      over: the run has its record now.
      error: the worker cannot go on.
    """

    name: str
    line: str
    share: float | None = None
    over: bool = False
    error: bool = False


Tell = Callable[[Event], None]


def say(name: str, line: str) -> None:
    """Prints a line about a point or run."""
    print(f"{name}  {line}", flush=True)


class Tally:
    """Runs done and left, and the time that these will take.

    Until a run is over that is the time expected, then the time so far in proportion to the cost of the runs.
    """

    def __init__(
        self,
        done: int,
        left: Mapping[str, int],
        compared: Mapping[str, int],
        costs: Mapping[str, float],
        expected_s: int | float | None,
    ):
        """Starts the clock.

        Args:
          done: runs that have a record.
          left: about how many runs each point lacks, by its name.
          compared: how many of them come after its search.
          costs: of a run of each point, in any unit.
          expected_s: seconds that all runs left will take; None where unknown.
        """
        self.done, self._left, self._compared = done, dict(left), compared
        self._costs, self._expected_s = costs, expected_s
        self._worked, self._shares = 0.0, dict[str, float]()
        self._start = time.monotonic()

    @property
    def total(self) -> int:
        return self.done + sum(self._left.values())

    def at_work(self, point: str, share: float) -> None:
        """The run of a point that is at work has done a share of its steps."""
        self._shares[point] = share

    def run_over(self, point: str) -> None:
        self.done += 1
        self._left[point] = max(self._left[point] - 1, 0)
        self._worked += self._costs[point]
        self._shares.pop(point, None)

    def settle(self, point: str, searched: bool) -> None:
        """The search of a point is over, which may have been shorter or longer; or all of its runs are."""
        self._left[point] = self._compared[point] if searched else 0
        self._shares.pop(point, None)

    def seconds_left(self) -> float | None:
        passed = time.monotonic() - self._start
        if not self._worked:
            return None if self._expected_s is None else max(self._expected_s - passed, 0.0)
        shares = dict(self._shares)  # a copy: the thread that draws reads this while workers tell
        under_way = sum(share * self._costs[point] for point, share in shares.items())
        left = sum(count * self._costs[point] for point, count in self._left.items())
        return max(left - under_way, 0.0) * passed / (self._worked + under_way)

    def __str__(self) -> str:
        left = self.seconds_left()
        return f"{self.done} of about {self.total} runs" + (
            "" if left is None else f", {duration(left)} left"
        )


class View:
    """Plain lines: one for each run that is over, and for all that is not about a step."""

    def __init__(self, tally: Tally, lines_every: int | float):
        """Args: lines_every: seconds between two lines about the steps of a point."""
        self.tally, self._every = tally, lines_every
        self._printed = dict[str, float]()  # point -> when there was a line about its runs
        self._said = set[tuple[str, str]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begun(self, point: str) -> None:
        """A worker has begun with a point."""
        self._printed[point] = time.monotonic()

    def hear(self, point: str, event: Event) -> None:
        """Takes what the worker at a point tells."""
        if event.over:
            self.tally.run_over(point)
            self._run_over(point, event)
        elif event.share is not None:
            self.tally.at_work(point, event.share)
            self._step(point, event)
        elif event.error:
            print(f"{event.name}  {event.line}", file=sys.stderr, flush=True)
        elif (point, event.line) not in self._said:  # what all runs of a point have to say is said once
            self._said.add((point, event.line))
            say(event.name, event.line)

    def ended(self, point: str, line: str) -> None:
        """The worker at a point has ended."""
        say(point, line)

    def _run_over(self, point: str, event: Event) -> None:
        self._printed[point] = time.monotonic()
        say(event.name, f"{event.line}  ({self.tally})")

    def _step(self, point: str, event: Event) -> None:
        if time.monotonic() - self._printed[point] >= self._every:
            self._printed[point] = time.monotonic()
            say(event.name, event.line)


class LiveView(View):
    """A block at the bottom of the terminal: runs done, time left, and a line for each worker.

    What is printed meanwhile appears above it. Runs that are over have no line, but those that went wrong.
    """

    def __init__(self, tally: Tally):
        from rich.console import Console  # here: 0.1 s, for nothing where there is no terminal
        from rich.live import Live

        super().__init__(tally, 0)
        self._workers = dict[str, str]()
        self._live = Live(
            console=Console(),
            get_renderable=self._block,
            refresh_per_second=_REFRESH_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        self._live.console.show_cursor(True)  # a process that is killed cannot bring it back
        signals.leave_terminal = self._live.stop
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signals.leave_terminal = None
        self._live.stop()

    def begun(self, point: str) -> None:
        self._workers[point] = f"{point}  starting"

    def ended(self, point: str, line: str) -> None:
        self._workers.pop(point, None)

    def _run_over(self, point: str, event: Event) -> None:
        self._workers[point] = f"{event.name}  {event.line}"
        if not event.line.startswith(FINISHED):
            say(event.name, event.line)

    def _step(self, point: str, event: Event) -> None:
        self._workers[point] = f"{event.name}  {event.line}"

    def _block(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(self.tally.total, self.tally.done, width=30), Text(str(self.tally)))
        lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in list(self._workers.values())]
        return Group(bar, *lines)


FINISHED = "finished"  # begins the line of a run that went well


def view_of(tally: Tally, lines_every: int | float) -> View:
    """A live block where there is a terminal that can move its cursor, else plain lines."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveView(tally)
    return View(tally, lines_every)
