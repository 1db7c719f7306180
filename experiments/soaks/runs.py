"""A tiny run in a process of its own: ended by a signal at a chosen moment, and compared with another."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mobilellm_jax.analysis.records import read_record
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.directory import read_config
from mobilellm_jax.storage.checkpoint import MANIFEST, Checkpoints, find_damage
from mobilellm_jax.training import signals
from mobilellm_jax.training.programs import make_programs
from mobilellm_jax.training.step import TrainState

# Of steps, saves and evaluations that take about as long as a look at them.
TINY = {
    "model.vocab_size": 264,
    "model.depth": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "model.ffn_width": 64,
    "data.tokenizer": "bytes",
    "data.valid_fraction": 0.3,
    "data.sequence_length": 64,
    "optimizer.warmup_steps": 2,
    "train.steps": 60,
    "train.batch_size": 8,
    "train.eval_every": 4,
    "train.eval_rows": 64,
    "train.eval_batch_size": 8,
    "train.checkpoint_every": 10,
    "train.log_every": 1,
}
_STATUS = {signal.SIGINT: 130, signal.SIGTERM: signals.RESUME_ME, signal.SIGHUP: signals.RESUME_ME}
_PATIENCE_S = 10.0  # between a signal and the end

Trials = Iterator[tuple[bool, str]]  # whether a trial succeeded, and its kind


@contextlib.contextmanager
def running(
    name: str, workdir: Path, fields: Mapping[str, object], *flags: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Starts a command in a session of its own; what still runs in the end is killed."""
    command = [sys.executable, "-u", "-m", f"experiments.{name}", *flags]
    command += [f"--workdir={workdir}"] if name != "plan" else []
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    ) as process:

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()  # it writes into a directory that is deleted next

        signals.before_end[process] = kill
        try:
            yield process
        finally:
            kill()
            del signals.before_end[process]


def wait_until_watched(process: subprocess.Popen[str]) -> None:
    """Waits until the first import is done: before it, SIGTERM ends the interpreter as any program."""
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)


def send(process: subprocess.Popen[str], number: signal.Signals) -> tuple[bool, str]:
    """Sends a signal and waits. Returns whether all ended as they should, in time, and what was printed."""
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=_PATIENCE_S)  # to the end of all that share the pipe
    except subprocess.TimeoutExpired:
        return False, ""
    if number == signal.SIGKILL:
        return process.returncode == -number, output  # or it had ended by itself
    told = [line for line in output.splitlines() if line.startswith("stopped by ")]
    crashed = "Traceback" in output or "Fatal Python error" in output
    return len(told) == 1 and not crashed and process.returncode == _STATUS[number], output


class SoakRun:
    """A run of `experiments.train`; `signalled` ones compile anew every time, and say so."""

    def __init__(self, corpus: Path, workdir: Path, signalled: bool = False):
        self.corpus, self.workdir = corpus, workdir
        self._environment = (
            {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"} if signalled else {}
        )

    def process(self) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """Starts it."""
        fields = {
            **TINY,
            "data.source": f"files:{self.corpus}/*.txt",
            "data.cache_dir": self.corpus / "cache",
        }
        return running("train", self.workdir, fields, environment=self._environment)

    def finish(self) -> tuple[str, float, float]:
        """Runs to the end. Returns what was printed, and the seconds of the start and of the training."""
        begin, first, lines = time.perf_counter(), 0.0, []
        with self.process() as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step ") and not first:
                    first = time.perf_counter()
                lines.append(line)
            if process.wait() != 0:
                raise UserError(f"a run ended with status {process.returncode}: {''.join(lines)}")
        return "".join(lines), first - begin, time.perf_counter() - first

    def end(self, aim: str, number: int, wait_s: float, sent: signal.Signals) -> tuple[bool, str] | None:
        """Sends a signal `wait_s` after its start, or after it began the aim for the `number`-th time.

        Returns whether it ended as it should, and what it was doing; None if it finished before.
        """
        lines = []
        with self.process() as process:
            assert process.stdout is not None
            wait_until_watched(process)
            from_start = aim in ("in the start", "while importing")
            while not from_start and number and (line := process.stdout.readline()):
                lines.append(line)
                number -= aim == self._next(line) and not (aim == "in a step" and self._is_saving())
            while aim == "in a save" and process.poll() is None and not self._is_saving():
                time.sleep(0.001)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
            saving = self._is_saving()
            ok, output = send(process, sent)
        if (self.workdir / "record.json").exists():
            return None
        if not ok:
            print(f"{process.returncode}: {output}", flush=True)
        if sent == signal.SIGKILL:
            return ok, self._killed(lines + output.splitlines())
        return ok, self._signalled(output, lines, saving)

    def _next(self, line: str) -> str | None:
        """The phase that begins after a line of output."""
        if re.search(r"Finished jaxpr to MLIR .*jit\((<lambda>|step|evaluate)", line):
            return "while compiling"
        if not line.startswith("step "):
            return None
        step, evaluated = _step_of(line), "held-out" in line
        if step % TINY["train.eval_every"] == 0 and not evaluated:
            return "in an evaluation"
        return "in a save" if step % TINY["train.checkpoint_every"] == 0 else "in a step"

    def _is_saving(self) -> bool:
        there = list((self.workdir / "checkpoints").glob("*"))
        return any("tmp" in path.name or not (path / MANIFEST).exists() for path in there)

    def _killed(self, lines: list[str]) -> str:
        """The phase in which a run was killed, inferred from its files and its last output."""
        lines = [line for line in lines if line.startswith("step ")]
        if not lines:
            return "in the start"
        left = list((self.workdir / "checkpoints").glob("*"))
        if any("tmp" in path.name or find_damage(path) for path in left):
            return "in a save"
        doing = self._next(lines[-1])
        return "in a step" if doing == "in a save" else str(doing)  # the save was done, or had not begun

    def _signalled(self, output: str, before: list[str], saving: bool) -> str:
        """The phase in which a signal arrived, inferred from its message and the output `before`."""
        moment = re.search(r"stopped by \w+ (while \w+|after step)?", output)
        if not moment or not moment[1]:
            return "elsewhere"
        if moment[1] != "after step":
            return moment[1]
        if saving:
            return "in a save"
        return "in an evaluation" if self._next(before[-1]) == "in an evaluation" else "in a step"

    @property
    def config(self) -> Config:
        return from_config_dict(read_config(self.workdir / "config.json"))

    def like(self) -> TrainState:
        mesh = partition.make_mesh(self.config.mesh)
        return make_programs(self.config, mesh).state

    def contents(self) -> tuple[Any, ...]:
        """Everything that must not depend on signals: step, state, log and record without times."""
        restored = restore(self.workdir / "checkpoints", self.like())
        assert restored is not None
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] != "save"]  # one more where a signal stopped it
        for line in lines:
            line.pop("train_s", None)
            line.pop("sha256")  # of the times, too
        record = read_record(self.workdir / "record.json")
        return *restored, lines, record.evaluations, record.train_curve, record.data, record.steps


def _step_of(line: str) -> int:
    return int(line.split()[1].split("/")[0].replace(",", ""))


def restore(directory: Path, like: TrainState) -> tuple[int, Any] | None:
    """The newest intact step of the checkpoints in `directory`, and its state in numpy."""
    checkpoints = Checkpoints(directory)
    try:
        restored = checkpoints.restore_latest(like)
        return restored and (restored[0], jax.device_get(restored[1]))
    finally:
        checkpoints.close()


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
