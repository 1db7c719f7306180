"""Signals that ask a run to stop: SIGINT from a person, SIGTERM from a scheduler that wants the machine."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from mobilellm_jax.errors import Preempted


@contextlib.contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Yields a list that SIGINT and SIGTERM are added to; a second SIGINT acts as it would without this.

    A second SIGTERM does not: scheduler and sweep may send one each, and neither wants the save cut short.
    """
    received: list[str] = []
    previous: dict[int, Any] = {}

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # a sweep's process, which the sweep itself stops
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def preempt(*_: Any) -> None:
    """Is a handler of SIGTERM, for where nothing has to be saved.

    Raises:
      Preempted: always.
    """
    raise Preempted("stopped by SIGTERM")
