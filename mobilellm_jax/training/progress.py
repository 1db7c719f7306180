"""Progress of a run: its clock, its log and its printed lines."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array

from mobilellm_jax.config import Config, to_dict
from mobilellm_jax.storage.files import AnyPath, is_bucket
from mobilellm_jax.storage.metrics import MetricsLog
from mobilellm_jax.storage.writers import Writer, names_of, open_writers
from mobilellm_jax.training.held_out import Scores
from mobilellm_jax.training.step import Metrics


class Diverged(Exception):
    """A loss is not finite."""

    def __init__(self, what: str, step: int):
        super().__init__(f"the {what} is not finite at step {step}; the last good step is {step - 1}")


class StepLine(str):
    """A line about a run after a step, or before the first.

    Attributes:
      share: of the steps of the run that are done, from 0 to 1.
    """

    share: float

    @classmethod
    def at(cls, share: int | float, text: str) -> "StepLine":
        line = cls(text)
        line.share = share
        return line


def every(n: int, step: int) -> bool:
    """True after every `n`-th step; steps count from 1."""
    return step % n == 0


class Progress:
    """Reads, logs and prints the metrics of a run.

    The metrics of a step are read one step later, while the device computes the next one.

    Attributes:
      step: the last step whose metrics were read.
      train_s: seconds in training steps up to that step, over all sittings.
      evaluations, train_curve: those of `MetricsLog`.
    """

    def __init__(
        self, config: Config, workdir: AnyPath, start: int, say: Callable[[str], None], place: int = 0
    ):
        """Opens the log in `workdir`, truncated to step `start`, and starts the clock.

        `place` is that of the run among those that train in one program; all share the time of a step.
        """
        names, is_first = names_of(config.train.writers), jax.process_index() == 0
        if "tensorboard" in names and is_bucket(workdir):
            say(
                f"{workdir}: TensorBoard events are not written to a bucket; read metrics.jsonl, which is "
                "updated at every checkpoint"
            )

        def opened() -> list[Writer]:
            return open_writers(names, workdir, start, to_dict(config), say)

        self._log = MetricsLog(workdir, start, write=is_first, open_writers=opened)
        self._train, self._say, self._place = config.train, say, place
        self._tokens_per_step = config.train.batch_size * config.data.sequence_length
        self._pending: tuple[int, float, Metrics] | None = None
        self.evaluations, self.train_curve = self._log.evaluations, self._log.train_curve
        self._clock = Clock(start, self._log.train_s)
        self.step, self.train_s = start, self._clock.total

    def stepped(self, step: int, learning_rate: float, metrics: Metrics) -> None:
        """Stores the metrics of a step that was just dispatched, and reads those of the previous step.

        Raises:
          Diverged: the loss of the previous step is not finite.
        """
        self.catch_up()
        self._pending = step, learning_rate, metrics

    def catch_up(self) -> None:
        """Waits for the last step, and reads its metrics.

        Raises:
          Diverged: its loss is not finite.
        """
        if self._pending is None:
            return
        (self.step, learning_rate, metrics), self._pending = self._pending, None
        loss, self.train_s = self._read(metrics["loss"]), self._clock.total
        teacher = self._read(metrics["teacher_loss"]) if "teacher_loss" in metrics else None
        diverged = not math.isfinite(loss + (teacher or 0.0))
        if every(self._train.log_every, self.step) or self.step == self._train.steps or diverged:
            speed = self._clock.rate(self.step, self._tokens_per_step)
            terms = {} if teacher is None else {"teacher_loss": teacher}
            norm = self._read(metrics["grad_norm"])
            self._log.train(self.step, loss, norm, learning_rate, self.train_s, terms)
            left = duration((self._train.steps - self.step) * self._tokens_per_step / speed)
            beside = "" if teacher is None else f"  teacher's {teacher:.4f}"
            self._tell(f"loss {loss:.4f}{beside}  {speed:,.0f} tokens/s  {left} left")
        if diverged:
            raise Diverged("loss", self.step)

    def evaluated(self, scores: Scores) -> None:
        """Logs the held-out scores after the last step.

        Raises:
          Diverged: the held-out loss is not finite.
        """
        loss, bits, error = scores.loss, scores.bits_per_byte, scores.error
        self._log.evaluation(self.step, loss, bits, error, scores.measures)
        more = f"  {bits:.4f} bits/byte" if bits else "" if error is None else f"  {error:.1%} wrong"
        more += "".join(f"  {name} {value:.4g}" for name, value in [*scores.measures.items()][:1])
        self._tell(f"held-out loss {loss:.4f}{more}")
        if not math.isfinite(loss):
            raise Diverged("held-out loss", self.step)

    def before_save(self) -> None:
        """Writes the log to disk, so that a checkpoint is never ahead of the log."""
        self._log.save(self.step, self.train_s)
        self._log.flush()

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the clock is stopped."""
        return self._clock.paused()

    def close(self) -> None:
        self._log.close()

    def _read(self, value: Array) -> float:
        """The number of this run; the first to read it waits for the step and brings those of all trials."""
        return float(np.asarray(value).reshape(-1)[self._place])

    def _tell(self, line: str) -> None:
        said = f"step {self.step:,}/{self._train.steps:,}  {line}"
        self._say(StepLine.at(self.step / self._train.steps, said))


class Clock:
    """Seconds spent in training steps, without evaluation and checkpoints."""

    def __init__(self, step: int, total: float):
        self._before, self._start = total, time.perf_counter()
        self._last = step, total

    @property
    def total(self) -> float:
        return self._before + time.perf_counter() - self._start

    def rate(self, step: int, tokens_per_step: int) -> float:
        """Tokens per second since the last call, or since the start."""
        (last_step, last_total), self._last = self._last, (step, self.total)
        return (step - last_step) * tokens_per_step / (self.total - last_total)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
