"""Drives a headless Chromium by the DevTools protocol over two pipes, which takes no other package."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "not found: apt-get install chromium"


def found() -> str | None:
    """The path of a Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page. A pipe holds JSON messages, each with a zero byte behind it."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._read = to_browser, from_browser, b""
        self._numbers, self._session = itertools.count(1), ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, timeout_s: float = 60, **params: Any) -> dict[str, Any]:
        """Sends a command, and returns the result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout_s
        while (answer := self._next(end)).get("id") != number:
            pass  # events
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression: str, timeout_s: float = 60) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        found = self.ask("Runtime.evaluate", timeout_s, **asked)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 60) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}: {self.evaluate('document.body.innerText')}"
            time.sleep(0.1)

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0))
            piece = os.read(self._from, 1 << 20) if ready else b""
            assert piece, "Chromium has not answered"
            self._read += piece
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def page(folder: Path) -> Iterator[Page]:
    """Starts the browser, which keeps its files in `folder`."""
    program = found()
    assert program
    its_in, to_browser = os.pipe()
    from_browser, its_out = os.pipe()

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "--no-first-run"]
    with (folder.parent / "chromium.log").open("wb") as log:
        # Chromium reads from 3 and writes to 4, where a shell puts the pipes:
        # with preexec_fn Python would fork, of which JAX warns.
        place = f'exec "$@" 3<&{its_in} 4>&{its_out}'
        process = subprocess.Popen(
            ["bash", "-c", place, "bash", program, *flags],
            pass_fds=(its_in, its_out), stdout=log, stderr=log,
        )  # fmt: skip
    os.close(its_in)
    os.close(its_out)
    try:
        yield Page(to_browser, from_browser)
    finally:
        process.terminate()
        process.wait(30)
        os.close(to_browser)
        os.close(from_browser)
