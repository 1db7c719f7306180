"""Synthetic tasks: short problems, drawn anew for every batch, that some depths can solve and others cannot.

A source such as "khop:hops=4,min_hops=1,symbols=9,queries=3" names a task and all its parameters; none has
a default. Nothing is prepared on disk, and rows repeat only by chance: batch n of a run comes from NumPy's
counter-based Philox generator at counter n, so the state of the data is the step alone. Held-out rows, and
those for tuning, come from keys of their own, the same for all runs.

Only answers are targets, see `rows.no_target`. In the examples below, ".a" is input only, "=b" an answer.
In training and evaluation, the right answers before a position are among its inputs, so that a row counts as
right exactly when greedy decoding would have found all its answers.
"""

import abc
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from mobilellm_jax.config import TASKS, DataConfig
from mobilellm_jax.data.pipeline import local_batch_size, padded_batches
from mobilellm_jax.data.rows import PADDING, no_target
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.validation import check

FORMAT_VERSION = 1  # raise it when the same spec would give other rows


class Task(abc.ABC):
    """A function from random numbers to rows."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids in use."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """T, tokens that a row predicts."""

    @property
    @abc.abstractmethod
    def draws(self) -> int:
        """R, random numbers drawn for a row."""

    @abc.abstractmethod
    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        """Rows [B, T + 1] from random uint64 [B, R]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KHop(Task):
    """Pointer chasing: k lookups, each of which needs the one before ("k-hop", Sanford et al. 2024,
    arXiv 2402.09268, there as induction over a text).

    A row is a cycle through all symbols, given as arrows in random order, one token each. Then comes a part
    for every number of hops k from `hops` down to `min_hops`: k marks ">", and `queries` times a symbol and
    the symbol k arrows further on. With symbols A to E, hops=2, min_hops=1, queries=2:

      .(C>A) .(A>E) .(D>C) .(B>D) .(E>B)  .> .> .B =C .E =D  .> .E =B .A =E

    One cycle, so that no number of hops below `symbols` is the identity (a random permutation maps a quarter
    of 12 symbols to themselves in 4 hops), and more than twice as many symbols as hops, so that going back is
    no shorter. The first answer of a section has no help from others of its number of hops, and the most hops
    come first, so that nothing but arrows helps the first answer of all: done one by one, its lookups take
    `hops` attention layers. (Of few symbols, a wide layer can learn combinations by heart; of 7, two hops.)
    Fewer hops are the easier lesson on the way.

    Attributes:
      hops, min_hops: largest and smallest k in a row.
      symbols: length of the cycle; token ids 0 to symbols - 1, then the mark, then arrow a>b as
        symbols + 1 + symbols a + b.
      queries: questions in a section, of different symbols.
    """

    hops: int
    min_hops: int
    symbols: int
    queries: int

    def __post_init__(self) -> None:
        check(1 <= self.min_hops <= self.hops, "min_hops", self.min_hops, f"1 to hops={self.hops}")
        check(self.symbols > 2 * self.hops, "symbols", self.symbols, f"more than 2 hops={2 * self.hops}")
        check(1 <= self.queries <= self.symbols, "queries", self.queries, f"1 to symbols={self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1 + self.symbols**2

    @property
    def length(self) -> int:
        sections = len(self._sections)
        marks = sections * (self.hops + self.min_hops) // 2
        return self.symbols + marks + 2 * self.queries * sections - 1

    @property
    def draws(self) -> int:
        return self.symbols * (2 + len(self._sections))

    @property
    def _sections(self) -> range:
        return range(self.hops, self.min_hops - 1, -1)

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        n = self.symbols
        cycle_BN, order_BN, *asked = (
            _permutations(random_BR[:, start : start + n]) for start in range(0, self.draws, n)
        )

        def on_cycle(place_BQ: np.ndarray) -> np.ndarray:
            return np.take_along_axis(cycle_BN, place_BQ % n, axis=1)

        parts = [no_target(n + 1 + n * on_cycle(order_BN) + on_cycle(order_BN + 1))]
        for k, asked_BN in zip(self._sections, asked, strict=True):
            place_BQ = asked_BN[:, : self.queries]
            pairs_BQ2 = np.stack([no_target(on_cycle(place_BQ)), on_cycle(place_BQ + k)], axis=2)
            parts += [np.full((len(place_BQ), k), no_target(n)), pairs_BQ2.reshape(len(place_BQ), -1)]
        return np.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition(Task):
    """Addition of several numbers, as in the looped transformers of Saunshi et al. 2025 (arXiv 2502.17416).

    Digits stand with the least significant first, so that every digit of the sum can be computed from what
    comes before it. 26 + 95 = 121 with operands=2, digits=2:

      .6 .2 .+ .5 .9 .= =1 =2 =1

    Attributes:
      operands: numbers in the sum.
      digits: digits of each, zeros at the end included; token ids 0 to 9, "+" is 10 and "=" 11. The sum has
        as many digits as the largest sum needs.
    """

    operands: int
    digits: int

    def __post_init__(self) -> None:
        check(2 <= self.operands <= 1000, "operands", self.operands, "2 to 1000")
        check(1 <= self.digits <= 15, "digits", self.digits, "1 to 15")  # sums fit 64 bits

    @property
    def vocab_size(self) -> int:
        return 12

    @property
    def length(self) -> int:
        return self.operands * (self.digits + 1) + self._sum_digits - 1

    @property
    def draws(self) -> int:
        return self.operands

    @property
    def _sum_digits(self) -> int:
        return len(str(self.operands * (10**self.digits - 1)))

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        number_BR = _integers(random_BR, 10**self.digits)
        sign_BR1 = np.full((*number_BR.shape, 1), 10)
        sign_BR1[:, -1] = 11
        problem_BRD = np.concatenate([_digits(number_BR, self.digits), sign_BR1], axis=2)
        answer_BD = _digits(number_BR.sum(axis=1), self._sum_digits)
        return np.concatenate([no_target(problem_BRD.reshape(len(number_BR), -1)), answer_BD], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Associative recall with several queries (Arora et al. 2023, arXiv 2312.04927): any depth will do.

    Pairs of a key and its value, one token each, then `queries` of the keys with their values. Keys are all
    different, values need not be. With pairs=3, symbols=4 (keys A to D, values a to d), queries=2:

      .(C>a) .(A>d) .(D>a)  .A =d .C =a

    One attention layer does it. (Key and value as two tokens, as in the reference, take a layer more, which
    tells the value its key.)

    Attributes:
      pairs: pairs in a row.
      symbols: number of distinct keys, token ids 0 to symbols - 1, and of distinct values, the next ids; the
        pair key>value is 2 symbols + symbols key + value, counting values from 0.
      queries: pairs asked for, each at most once.
    """

    pairs: int
    symbols: int
    queries: int

    def __post_init__(self) -> None:
        check(self.pairs >= 1, "pairs", self.pairs, "at least 1")
        check(self.symbols >= self.pairs, "symbols", self.symbols, f"at least pairs={self.pairs}")
        check(1 <= self.queries <= self.pairs, "queries", self.queries, f"1 to pairs={self.pairs}")

    @property
    def vocab_size(self) -> int:
        return 2 * self.symbols + self.symbols**2

    @property
    def length(self) -> int:
        return self.pairs + 2 * self.queries - 1

    @property
    def draws(self) -> int:
        return self.symbols + 2 * self.pairs

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        n, pairs = self.symbols, self.pairs
        key_BP = _permutations(random_BR[:, :n])[:, :pairs]
        value_BP = _integers(random_BR[:, n : n + pairs], n)
        asked_BQ = _permutations(random_BR[:, n + pairs :])[:, : self.queries]
        key_BQ, value_BQ = (np.take_along_axis(x_BP, asked_BQ, axis=1) for x_BP in (key_BP, value_BP))
        pairs_BQ2 = np.stack([no_target(key_BQ), n + value_BQ], axis=2)
        told_BP = no_target(2 * n + n * key_BP + value_BP)
        return np.concatenate([told_BP, pairs_BQ2.reshape(len(told_BP), -1)], axis=1)


_KEY = {"train": 0, "valid": 1, "tuning": 2}  # of the random stream of a split
_CLASSES: dict[str, Any] = dict(zip(TASKS, (KHop, Addition, Recall), strict=True))


def _permutations(random_BN: np.ndarray) -> np.ndarray:
    return np.argsort(random_BN, axis=1, kind="stable")


def _integers(random: np.ndarray, below: int) -> np.ndarray:
    """Maps random uint64 to int64 in [0, below); at 10**15, probabilities differ by a factor of 1 + 6e-5."""
    return (random % np.uint64(below)).astype(np.int64)


def _digits(numbers: np.ndarray, count: int) -> np.ndarray:
    """Decimal digits [..., count], least significant first."""
    return numbers[..., None] // 10 ** np.arange(count) % 10


# --- data made of a task -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The rows of a task, a `pipeline.Dataset`; they repeat only by chance.

    Attributes:
      train, valid: the task of each split ("tuning" has that of "valid"); they differ in studies of
        extrapolation.
      card: the data card, ready for JSON.
    """

    train: Task
    valid: Task
    card: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        """T; a row holds T + 1 token ids."""
        return self.card["sequence_length"]

    def bytes_per_token(self, split: str) -> None:
        """None, as tasks have no text."""

    def tokenizer(self) -> None:
        """None, as tasks have no text."""

    def num_rows(self, split: str) -> None:
        """None, as rows are drawn without end."""

    def check_rows(self, split: str) -> None:
        """Every split of a task has rows."""

    def eval_documents(self, rows: int, split: str) -> None:
        """None, as tasks have no documents."""

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[np.ndarray]:
        local_batch_size("train.batch_size", batch_size, process_count)
        # Every process draws all rows, and keeps its own: 0.1 ms for 32 rows, 2.5 ms for 1,024.
        batches = (self.rows("train", batch_size, seed, step) for step in itertools.count(start_step))
        return (batch[process_index::process_count] for batch in batches)

    def eval_batches(
        self,
        *,
        batch_size: int,
        rows: int = 0,
        split: str = "valid",
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[np.ndarray]:
        local_batch_size("train.eval_batch_size", batch_size, process_count)
        drawn = self.rows(split, rows, 0, 0)
        return padded_batches(drawn.__getitem__, np.arange(rows), batch_size, process_index, process_count)

    def rows(self, split: str, count: int, seed: int, number: int) -> np.ndarray:
        """Batch `number`, int32 [count, T + 1], of the random stream of `seed` in a split."""
        task = self.train if split == "train" else self.valid
        # `number` is in the highest word of the counter, so that no two batches overlap.
        generator = np.random.Philox(key=[seed, _KEY[split]], counter=[0, 0, 0, number])
        # NumPy guarantees the sequence of raw numbers alone
        rows = task.rows(generator.random_raw(count * task.draws).reshape(count, task.draws))
        padding = self.sequence_length + 1 - rows.shape[1]
        return np.pad(rows.astype(np.int32), ((0, 0), (0, padding)), constant_values=PADDING)


def open_task(data: DataConfig) -> TaskData:
    """Opens the task of `data.source`; held-out rows are those of `data.valid_source`, where it is set.

    Raises:
      UserError: a spec is not valid, its rows do not fit `data.sequence_length`, or the vocabularies differ.
    """
    specs = {"source": data.source}
    if data.valid_source:
        specs["valid_source"] = data.valid_source
    tasks = {name: _parse(spec, f"data.{name}") for name, spec in specs.items()}
    for name, task in tasks.items():
        if task.length > data.sequence_length:
            raise UserError(
                f"data.sequence_length: {data.sequence_length} is too short for data.{name}={specs[name]!r}; "
                f"the smallest valid value is {task.length}"
            )
    train, valid = tasks["source"], tasks.get("valid_source", tasks["source"])
    if train.vocab_size != valid.vocab_size:
        raise UserError(
            f"data.valid_source: {data.valid_source!r} has {valid.vocab_size} token ids; expected "
            f"{train.vocab_size}, as in data.source={data.source!r}"
        )
    kind = data.source.partition(":")[0]
    card = {
        "format": FORMAT_VERSION,
        "source": data.source,
        "source_sha256": _sha256(kind, vars(train)),
        "valid_source": data.valid_source or None,
        "valid_source_sha256": _sha256(kind, vars(valid)) if data.valid_source else None,
        "tokenizer": None,
        "tokenizer_sha256": _sha256(kind, train.vocab_size),
        "vocab_size": train.vocab_size,
        "sequence_length": data.sequence_length,
    }
    return TaskData(train, valid, card)


def _parse(spec: str, field: str) -> Task:
    kind, _, rest = spec.partition(":")
    task = _CLASSES[kind]
    names = [f.name for f in dataclasses.fields(task)]
    shape = f"{kind}:" + ",".join(f"{name}=<integer>" for name in names)
    values: dict[str, int] = {}
    for item in rest.split(","):
        match = re.fullmatch(r"(\w+)=(\d{1,9})", item.strip())
        if match is None or match[1] in values:
            raise UserError(f"{field}: {spec!r} is not valid; expected {shape!r}")
        if match[1] not in names:
            raise UserError(
                f"{field}: {spec!r} has no parameter {match[1]!r}; {did_you_mean(match[1], names)}"
            )
        values[match[1]] = int(match[2])
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{field}: {spec!r} lacks {', '.join(missing)}; expected {shape!r}")
    try:
        return task(**values)
    except UserError as error:
        raise UserError(f"{field}: {spec!r}: {error}") from None


def _sha256(kind: str, numbers: int | dict[str, int]) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, kind, numbers], sort_keys=True).encode()).hexdigest()
