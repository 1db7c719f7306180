"""The log of a run: `metrics.jsonl`, one JSON object a line, and the same numbers as TensorBoard events."""

import json
import math
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from mobilellm_jax.errors import UserError
from mobilellm_jax.results import write_atomically


class MetricsLog:
    """Appends to the log of a run; when resuming, first drops the lines later than the checkpoint.

    Attributes:
      evaluations: {"step", "loss", "bits_per_byte", "error"} of all evaluations up to now, earlier sittings
        included.
      train_curve: [step, loss] of all training lines up to now.
      train_s: seconds of training up to the last line.
    """

    def __init__(self, workdir: Path, start_step: int, write: bool = True):
        """Opens the log of `workdir`, as it was after `start_step`.

        Raises:
          UserError: a line before the last is not JSON.
        """
        self.evaluations: list[dict[str, Any]] = []
        self.train_curve: list[list[Any]] = []
        self.train_s = 0.0
        path = workdir / "metrics.jsonl"
        kept = [line for line in _read(path) if line["step"] <= start_step] if start_step else []
        for line in kept:
            self._remember(line)
        self._file = self._events = None
        if write:
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = path.open("a")
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def train(self, step: int, loss: float, grad_norm: float, learning_rate: float, train_s: float) -> None:
        """Adds the metrics of a training step; a loss that is not finite is written as null."""
        line = {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        self._add("train", {**line, "train_s": round(train_s, 3)})

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None, error: float | None) -> None:
        """Adds an evaluation on the held-out split."""
        self._add("eval", {"step": step, "loss": loss, "bits_per_byte": bits_per_byte, "error": error})

    def flush(self) -> None:
        """Hands all lines to the operating system, so that a checkpoint never knows more than the log."""
        if self._file and self._events:
            self._file.flush()
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file and self._events:
            self._file.close()
            self._events.close()

    def _add(self, kind: str, values: dict[str, Any]) -> None:
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"kind": kind, **values}
        self._remember(line)
        if self._file and self._events:
            self._file.write(json.dumps(line) + "\n")
            for name, value in values.items():
                if name not in ("step", "train_s") and value is not None:
                    self._events.add_scalar(f"{kind}/{name}", value, values["step"], walltime=time.time())

    def _remember(self, line: dict[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name != "kind"}
        if line["kind"] == "eval":
            self.evaluations.append(values)
        else:
            self.train_curve.append([values["step"], values["loss"]])
            self.train_s = values["train_s"]


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if number < len(lines):  # the last line of a killed run may be half-written
                raise UserError(f"{path}, line {number}: not JSON; the log of this run is damaged") from None
    return parsed
