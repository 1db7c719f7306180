"""Kill real runs and damage real files, and count how often nothing was lost and nothing went unseen.

  python -m experiments.soak                       # 20 kills, 36 bits: about 8 minutes on 2 CPU cores
  python -m experiments.soak --kills=2 --flips=6

A tiny run is killed by SIGKILL at random moments of its start, of a step, of a save and of an evaluation, and
started again, up to four times. What it ends with has to be the same, bit for bit, as what the run that was
left alone ends with: parameters, optimizer state, every line of metrics.jsonl but the times, the record. What
a kill met is told by what it left on disk and what was printed last, not by what was aimed at. Then single
bits are flipped in checkpoints, prepared data, records, logs and configs, and files of a checkpoint cut,
emptied and deleted: each has to be noticed and the file named, and the newest intact checkpoint used. Exit
status 1 where a count is not full, or one of four kinds of moment was not met by 8 or more kills. On the CPU,
unless JAX_PLATFORMS says otherwise.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; runs inherit it

import jax
import numpy as np
from absl import flags, logging

from experiments import cli
from mobilellm_jax import data, partition, results
from mobilellm_jax.checkpoint import MANIFEST, Checkpoints, find_damage
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.metrics import MetricsLog
from mobilellm_jax.run import read_config
from mobilellm_jax.train import TrainState, make_programs

_KILLS = flags.DEFINE_integer("kills", 20, "how many runs to kill", 0)
_FLIPS = flags.DEFINE_integer("flips", 36, "how many bits to flip in each kind of file", 0)
_SEED = flags.DEFINE_integer("seed", 0, "of the random moments and bits", 0)

# Of steps, saves and evaluations that take about as long as a look at them.
_RUN = {
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
# What a kill may meet, and its share of the kills.
_MOMENTS = {"in the start": 0.15, "in a step": 0.35, "in a save": 0.25, "in an evaluation": 0.25}
_ALL_MOMENTS = 8  # so many kills meet all of them
_IN_A_ROW = 4


def main() -> int:
    """Runs all trials, and returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder, rng = Path(name), random.Random(_SEED.value)
        for i in range(60):
            words = [
                f"{rng.randrange(10**6):b} and {rng.choice(('one', 'two', 'three'))}." for _ in range(30)
            ]
            (folder / f"{i}.txt").write_text(f"Document {i}. {' '.join(words)}")
        straight = Run(folder, folder / "straight")
        _, start_s, training_s = straight.finish()
        killed = kills(straight, _KILLS.value, start_s, training_s / _RUN["train.steps"], rng)
        counts = [
            count("kills, then the same as without", killed),
            *damaged_checkpoints(straight, _FLIPS.value, rng),
            *damaged_data(straight, _FLIPS.value, rng),
            *damaged_words(straight, _FLIPS.value, rng),
        ]
    return 0 if all(counts) else 1


def count(what: str, trials: Iterator[tuple[bool, str]]) -> bool:
    """Prints how many of the trials went well, what did not, and in how many of each kind there were."""
    good, kinds = [], collections.Counter()
    for ok, kind in trials:
        good.append(ok)
        kinds[kind] += 1
        if not ok:
            print(f"  NOT: {what}: {kind}", flush=True)
    listed = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    print(f"{what}: {sum(good)} of {len(good)} ({listed})", flush=True)
    return all(good)


# --- kills ----------------------------------------------------------------------------------------------


class Run:
    """A run of `experiments.train` in a process of its own."""

    def __init__(self, corpus: Path, workdir: Path):
        self.corpus, self.workdir = corpus, workdir

    @contextlib.contextmanager
    def process(self) -> Iterator[subprocess.Popen[str]]:
        """Starts it; what still runs in the end is killed."""
        cache = self.corpus / "cache"
        fields = {**_RUN, "data.source": f"files:{self.corpus}/*.txt", "data.cache_dir": cache}
        command = [sys.executable, "-u", "-m", "experiments.train", f"--workdir={self.workdir}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

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

    def kill(self, aim: str, number: int, wait_s: float) -> str | None:
        """Kills it so long after its start, or after a step, save or evaluation has begun, the `number`-th.

        Returns what it was doing; None if it finished before.
        """
        lines = []
        with self.process() as process:
            assert process.stdout is not None
            while aim != "in the start" and number and (line := process.stdout.readline()):
                lines.append(line)
                number -= aim == self._next(line) and not (aim == "in a step" and self._is_saving())
            while aim == "in a save" and process.poll() is None and not self._is_saving():
                time.sleep(0.001)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
            process.kill()
            lines += process.stdout.read().splitlines()
        if (self.workdir / "record.json").exists():
            return None
        return self._doing([line for line in lines if line.startswith("step ")])

    def _next(self, line: str) -> str | None:
        """Returns what begins after a line of output."""
        if not line.startswith("step "):
            return None
        step, evaluated = _step_of(line), "held-out" in line
        if step % _RUN["train.eval_every"] == 0 and not evaluated:
            return "in an evaluation"
        return "in a save" if step % _RUN["train.checkpoint_every"] == 0 else "in a step"

    def _is_saving(self) -> bool:
        there = list((self.workdir / "checkpoints").glob("*"))
        return any("tmp" in path.name or not (path / MANIFEST).exists() for path in there)

    def _doing(self, lines: list[str]) -> str:
        """Returns what a killed run was doing, by what it left on disk and what it printed last."""
        if not lines:
            return "in the start"
        left = list((self.workdir / "checkpoints").glob("*"))
        if any("tmp" in path.name or find_damage(path) for path in left):
            return "in a save"
        doing = self._next(lines[-1])
        return "in a step" if doing == "in a save" else str(doing)  # the save was done, or had not begun

    @property
    def config(self) -> Config:
        return from_config_dict(read_config(self.workdir / "config.json"))

    def like(self) -> TrainState:
        mesh = partition.make_mesh(self.config.mesh)
        return make_programs(self.config, mesh).state

    def contents(self) -> tuple[Any, ...]:
        """Returns all that must not depend on kills: step, state, log and record without times."""
        restored = restore(self.workdir / "checkpoints", self.like())
        assert restored is not None
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("train_s", None)
            line.pop("sha256")  # of the times, too
        record = results.read(self.workdir / "record.json")
        return *restored, lines, record.evaluations, record.train_curve, record.data, record.steps


def _step_of(line: str) -> int:
    return int(line.split()[1].split("/")[0].replace(",", ""))


def restore(directory: Path, like: TrainState) -> tuple[int, Any] | None:
    """Returns the newest intact step of the checkpoints in `directory`, and its state in numpy."""
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


def kills(
    straight: Run, number: int, start_s: float, step_s: float, rng: random.Random
) -> Iterator[tuple[bool, str]]:
    """Yields for every kill whether the run ended as the one left alone, and what was killed.

    A run is killed up to `_IN_A_ROW` times, and then left to finish. Aims at what was met least by its share.
    """
    expected, met = straight.contents(), collections.Counter[str]()
    wanted = _MOMENTS if number >= _ALL_MOMENTS else {}

    def left() -> int:
        """Returns how many kills are still to come; some more than asked for where a moment was not met."""
        unmet = sum(not met[moment] for moment in wanted)
        return max(number - met.total(), unmet if met.total() < 2 * number else 0)

    while left():
        run, found = Run(straight.corpus, straight.workdir.with_name("killed")), list[str]()
        while len(found) < min(_IN_A_ROW, left()):
            so_far = met + collections.Counter(found)
            aim = min(_MOMENTS, key=lambda moment: (so_far[moment] + rng.random()) / _MOMENTS[moment])
            wait_s = rng.random() * (start_s if aim == "in the start" else step_s)
            doing = run.kill(aim, rng.randint(1, 12 if aim == "in a step" else 3), wait_s)
            if doing is None:
                break
            print(f"  killed {doing}", flush=True)
            found.append(doing)
        run.finish()
        ok = same(run.contents(), expected)
        yield from ((ok, doing) for doing in found)
        met.update(found)
        shutil.rmtree(run.workdir)
    yield from ((False, f"none was {moment}") for moment in wanted if not met[moment])


# --- damage ---------------------------------------------------------------------------------------------


def files_in(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def flips(path: Path, number: int, rng: random.Random) -> Iterator[None]:
    """Yields with one bit of the file flipped, another one every time.

    Not in bytes that are 0: array_record fills its files up with them, to blocks of 64 KB, and reads none.
    """
    content = path.read_bytes()
    bits = [8 * i + j for i, byte in enumerate(content) if byte for j in range(8)]
    for bit in rng.sample(bits, number):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield
    path.write_bytes(content)


def damaged_checkpoints(straight: Run, number: int, rng: random.Random) -> Iterator[bool]:
    """Damages the newest checkpoint in many ways, counts what was noticed, and lets the run mend it."""
    directory, like = straight.workdir / "checkpoints", straight.like()
    newest, before = sorted((int(path.name) for path in directory.iterdir()), reverse=True)[:2]
    aside = directory.with_name("aside")
    (directory / str(newest)).rename(aside)
    intact = restore(directory, like)
    aside.rename(directory / str(newest))
    files = [path for path in files_in(directory / str(newest)) if path.stat().st_size]

    def noticed(path: Path) -> bool:
        problem = find_damage(directory / str(newest))
        named = problem is not None and path.name in problem
        return named and intact is not None and intact[0] == before and same(restore(directory, like), intact)

    def flipped() -> Iterator[tuple[bool, str]]:
        sizes = [path.stat().st_size for path in files]
        for path in rng.choices(files, weights=sizes, k=number):
            for _ in flips(path, 1, rng):
                yield noticed(path), "in arrays" if path.parent.name == "d" else "in metadata"

    def spoilt() -> Iterator[tuple[bool, str]]:
        ways: dict[str, Callable[[Path, bytes], object]] = {
            "cut": lambda path, content: path.write_bytes(content[:-1]),
            "emptied": lambda path, _: path.write_bytes(b""),
            "deleted": lambda path, _: path.unlink(),
        }
        for path in files:
            content = path.read_bytes()
            for way, spoil in ways.items():
                spoil(path, content)
                yield noticed(path), way
                path.write_bytes(content)

    def mended() -> Iterator[tuple[bool, str]]:
        expected = straight.contents()
        (straight.workdir / "record.json").unlink()
        victim = max(files, key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
        output, _, _ = straight.finish()
        told = f"step {newest} will not be used" in output and victim.name in output
        yield told and same(straight.contents(), expected), f"resumed from step {before}"

    logging.set_verbosity(logging.ERROR)  # one warning for each is enough
    yield count("bits flipped in a checkpoint, noticed, the one before restored", flipped())
    yield count("files of a checkpoint cut, emptied or deleted, the same", spoilt())
    yield count("run resumed from the one before, the same in the end", mended())


def damaged_data(straight: Run, number: int, rng: random.Random) -> Iterator[bool]:
    """Damages prepared rows and their card, and counts what was noticed."""
    run = straight.config
    prepared = data.prepare(run.data, run.model.vocab_size)
    assert isinstance(prepared, data.PreparedData)

    def read() -> list[bytes]:
        there = data.open_prepared(prepared.directory)
        batches = data.train_batches(there, batch_size=64, seed=0)
        count = -(-there.num_rows("train") // 64)
        return [next(batches).tobytes() for _ in range(count)]

    expected = read()

    def flipped(name: str) -> Iterator[tuple[bool, str]]:
        for _ in flips(prepared.directory / name, number, rng):
            try:
                yield False, "harmless" if read() == expected else "wrong rows"
            except UserError as error:
                yield str(prepared.directory) in str(error), "refused"

    yield count("bits flipped in the data card, noticed", flipped("card.json"))
    yield count("bits flipped in prepared rows, noticed", flipped("train-00000.array_record"))


def damaged_words(straight: Run, number: int, rng: random.Random) -> Iterator[bool]:
    """Flips bits in the record, the log and the config of a run, and counts what was noticed."""

    def log(path: Path) -> Any:
        there = MetricsLog(path.parent, _RUN["train.steps"], write=False)
        return there.evaluations, there.train_curve, there.train_s

    readers: dict[str, Callable[[Path], Any]] = {
        "record.json": results.read,
        "metrics.jsonl": log,
        "config.json": read_config,
    }

    def flipped(name: str) -> Iterator[tuple[bool, str]]:
        path = straight.workdir / name
        expected = readers[name](path)
        for _ in flips(path, number, rng):
            try:
                equal = readers[name](path) == expected
                yield equal, "without a meaning" if equal else "read"
            except UserError as error:
                yield str(path) in str(error), "refused"

    for name in readers:
        yield count(f"bits flipped in {name}, noticed", flipped(name))


if __name__ == "__main__":
    cli.run(main)
