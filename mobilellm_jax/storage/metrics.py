"""The log of a run: `metrics.jsonl`, one JSON object a line, and the same numbers for its writers.

Every line has a checksum, except in logs of earlier versions. A log in a bucket is written when a checkpoint
is saved.
"""

import contextlib
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath, Appender, reason
from mobilellm_jax.storage.sealed import parse, seal, unseal_if_sealed
from mobilellm_jax.storage.writers import Writer

_KEYS = {
    "train": {"step", "loss", "grad_norm", "learning_rate", "train_s"},
    "eval": {"step", "loss", "bits_per_byte", "error"},
    "save": {"step", "train_s"},
}
_MORE = {"train": {"teacher_loss"}, "save": set[str]()}  # that a line may have; of "eval", any


class MetricsLog:
    """Appends to the log of a run; when resuming, first drops the lines later than the checkpoint.

    Attributes:
      evaluations: {"step", "loss", "bits_per_byte", "error"}, and what a task measures, of all evaluations up
        to now, those before a resume included.
      train_curve: [step, loss] of all training lines up to now.
      train_s: seconds of training up to the last line.
    """

    def __init__(
        self,
        workdir: AnyPath,
        start_step: int,
        write: bool = True,
        open_writers: Callable[[], Sequence[Writer]] = tuple,
    ):
        """Opens the log of `workdir`, as it was after `start_step`, and its writers if it is to be written.

        Raises:
          UserError: a line is corrupt (an incomplete last line is dropped), or the file is missing; as in all
            methods, the log cannot be written.
        """
        self.evaluations: list[dict[str, Any]] = []
        self.train_curve: list[list[Any]] = []
        self.train_s = 0.0
        self._path = path = workdir / "metrics.jsonl"
        kept = [line for line in _read(path) if line["step"] <= start_step] if start_step else []
        for line in kept:
            self._remember(line)
        self._file: Appender | None = None
        self._writers: Sequence[Writer] = ()
        if write:
            with self._explained():
                self._file = Appender(path, "".join(map(_text, kept)))
                self._writers = open_writers()

    def train(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        train_s: float,
        terms: Mapping[str, float] = types.MappingProxyType({}),
    ) -> None:
        """Adds the metrics of a training step, and by name other terms of its loss.

        What is not finite is written as null.
        """
        line = {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        self._add("train", {**line, "train_s": round(train_s, 3), **terms})

    def evaluation(
        self,
        step: int,
        loss: float,
        bits_per_byte: float | None,
        error: float | None,
        measures: Mapping[str, float] = types.MappingProxyType({}),
    ) -> None:
        """Adds an evaluation on the held-out split, and by name what a task measures."""
        line = {"step": step, "loss": loss, "bits_per_byte": bits_per_byte, "error": error}
        self._add("eval", {**line, **measures})

    def save(self, step: int, train_s: float) -> None:
        """Adds the training time up to a checkpoint, as its last steps may have no line."""
        self._add("save", {"step": step, "train_s": round(train_s, 3)})

    def flush(self) -> None:
        """Syncs all lines to the disk, so that the log is never behind a checkpoint."""
        with self._explained():
            for file in (*filter(None, [self._file]), *self._writers):
                file.flush()

    def close(self) -> None:
        """Closes the file and the writers."""
        opened = [*self._writers, *filter(None, [self._file])]
        self._file, self._writers = None, ()
        with self._explained(), contextlib.ExitStack() as stack:
            for one in opened:
                stack.callback(one.close)

    def _add(self, kind: str, values: dict[str, Any]) -> None:
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"kind": kind, **values}
        self._remember(line)
        with self._explained():
            if self._file:
                self._file.write(_text(line))
            numbers = {
                f"{kind}/{name}": value
                for name, value in values.items()
                if name not in ("step", "train_s") and value is not None
            }
            for writer in self._writers if numbers else ():
                writer.add(values["step"], numbers)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path.parent}: the log cannot be written: {reason(error)}") from None

    def _remember(self, line: dict[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name != "kind"}
        if line["kind"] == "eval":
            self.evaluations.append(values)
            return
        self.train_s = values["train_s"]
        if line["kind"] == "train":
            self.train_curve.append([values["step"], values["loss"]])


def _text(line: dict[str, Any]) -> str:
    return json.dumps(seal(line)) + "\n"


def _read(path: AnyPath) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        why = f"cannot read the log that belongs to the last checkpoint: {reason(error)}"
        raise UserError(f"{path}: {why}; restore the file or use a new --workdir") from None
    parsed = []
    for number, text in enumerate(lines, start=1):
        try:
            line = unseal_if_sealed(parse(text))
            more = line.keys() - {"kind"} - _KEYS[line["kind"]]
            if not _KEYS[line["kind"]] <= line.keys() or not more <= _MORE.get(line["kind"], more):
                raise ValueError
            parsed.append(line)
        except (AttributeError, KeyError, TypeError, ValueError):
            # A killed run may leave an incomplete last line, without the object's end and a newline.
            if number < len(lines) or b"}" in text or text.endswith(b"\n"):
                raise UserError(
                    f"{path}: line {number} is corrupt; restore the file or use a new --workdir"
                ) from None
    return parsed
