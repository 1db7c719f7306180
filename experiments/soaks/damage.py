"""Damage to the files of a run: flipped bits, and files cut, emptied and deleted; each has to be noticed."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from experiments.soaks.runs import TINY, SoakRun, Trials, restore, same
from mobilellm_jax import data
from mobilellm_jax.analysis.records import read_record
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.directory import read_config
from mobilellm_jax.storage.checkpoint import find_damage
from mobilellm_jax.storage.metrics import MetricsLog

Part = tuple[str, Trials]


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


def damaged_checkpoints(straight: SoakRun, number: int, rng: random.Random) -> Iterator[Part]:
    """Damages the newest checkpoint in many ways, then lets the run resume from the one before."""
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

    def flipped() -> Trials:
        sizes = [path.stat().st_size for path in files]
        for path in rng.choices(files, weights=sizes, k=number):
            for _ in flips(path, 1, rng):
                yield noticed(path), "in arrays" if path.parent.name == "d" else "in metadata"

    def spoilt() -> Trials:
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

    def mended() -> Trials:
        expected = straight.contents()
        (straight.workdir / "record.json").unlink()
        victim = max(files, key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
        output, _, _ = straight.finish()
        told = f"step {newest} will not be used" in output and victim.name in output
        yield told and same(straight.contents(), expected), f"resumed from step {before}"

    logging.set_verbosity(logging.ERROR)  # one warning for each is enough
    yield "bits flipped in a checkpoint, noticed, the one before restored", flipped()
    yield "files of a checkpoint cut, emptied or deleted, the same", spoilt()
    yield "run resumed from the one before, the same in the end", mended()


def damaged_data(straight: SoakRun, number: int, rng: random.Random) -> Iterator[Part]:
    """Damages prepared rows and their card."""
    run = straight.config
    prepared = data.prepare(run.data, run.model.vocab_size)
    assert isinstance(prepared, data.PreparedData)

    def read() -> list[bytes]:
        there = data.open_prepared(prepared.directory)
        batches = there.train_batches(batch_size=64, seed=0)
        count = -(-there.num_rows("train") // 64)
        return [next(batches).tobytes() for _ in range(count)]

    expected = read()

    def flipped(name: str) -> Trials:
        for _ in flips(prepared.directory / name, number, rng):
            try:
                yield False, "harmless" if read() == expected else "wrong rows"
            except UserError as error:
                yield str(prepared.directory) in str(error), "refused"

    yield "bits flipped in the data card, noticed", flipped("card.json")
    yield "bits flipped in prepared rows, noticed", flipped("train-00000.array_record")


def damaged_words(straight: SoakRun, number: int, rng: random.Random) -> Iterator[Part]:
    """Flips bits in the record, the log and the config of a run."""

    def log(path: Path) -> Any:
        there = MetricsLog(path.parent, TINY["train.steps"], write=False)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return there.evaluations, there.train_curve, there.train_s, lines

    readers: dict[str, Callable[[Path], Any]] = {
        "record.json": read_record,
        "metrics.jsonl": log,
        "config.json": read_config,
    }

    def flipped(name: str) -> Trials:
        path = straight.workdir / name
        expected = readers[name](path)
        for _ in flips(path, number, rng):
            try:
                equal = readers[name](path) == expected
                yield equal, "without a meaning" if equal else "read"
            except UserError as error:
                yield str(path) in str(error), "refused"

    for name in readers:
        yield f"bits flipped in {name}, noticed", flipped(name)
