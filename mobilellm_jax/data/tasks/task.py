"""What every task has in common: rows from random numbers, and how answers are scored.

Letters: B or R rows of S = T + 1 ids, T targets.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mobilellm_jax.data.rows import targets_of

NO_LEVEL = -1


@dataclasses.dataclass(frozen=True)
class Stream:
    """Random numbers of one split under one seed, from NumPy's counter-based Philox generator.

    NumPy guarantees the sequence of raw numbers alone, so that nothing else of it is used.
    """

    seed: int
    split: int

    def numbers(self, count: int, number: int, kind: int = 0) -> np.ndarray:
        """The first `count` uint64 of part `number`; parts do not overlap, nor do kinds."""
        # `number` is in the highest word of the counter.
        key, counter = [self.seed, self.split], [0, 0, kind, number]
        return np.random.Philox(key=key, counter=counter).random_raw(count)


@dataclasses.dataclass(frozen=True)
class Measures:
    """Scores of a task's held-out rows; names and units are in `analysis/measures.py`, lower is better.

    Attributes:
      values: by name; names that stand in no table ("bits") are for readers.
      floor: what a model that has learned nothing would have, by name; ceiling: the best there is. A name
        without a known one is missing.
      levels: {"name", "level", "accuracy", "floor" (share of the commonest answer), "ceiling", "answers"
        (their number)}, a list for each level; None for tasks without levels.
    """

    values: dict[str, float]
    floor: dict[str, float]
    ceiling: dict[str, float]
    levels: dict[str, Any] | None = None

    def as_field(self) -> dict[str, Any]:
        """`Record.measures`."""
        return {"floor": self.floor, "ceiling": self.ceiling, "levels": self.levels}


class Task(abc.ABC):
    """A function from random numbers to rows, and from a model's guesses to scores.

    Attributes:
      level: what the levels of difficulty count.
      unhashed: numbers of the spec that change neither what is asked nor the right answers.
    """

    level: ClassVar[str] = "kind"
    unhashed: ClassVar[tuple[str, ...]] = ()

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

    @abc.abstractmethod
    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        """Level of the answer that is complete with each target, int [R, T]; `NO_LEVEL` at all others."""

    @abc.abstractmethod
    def floors(self) -> dict[int, float]:
        """Share of answers, by level, that the best guess without a look at the problem gets right."""

    def batches(self, stream: Stream, count: int, numbers: Sequence[int]) -> np.ndarray:
        """The batches of these numbers, of `count` rows each, one below the other: [rows, T + 1]."""
        return self.rows(self.random(stream, count, numbers))

    def random(self, stream: Stream, count: int, numbers: Sequence[int]) -> np.ndarray:
        """Random numbers of the rows of `batches`, [rows, R]."""
        parts = [stream.numbers(count * self.draws, number) for number in numbers]
        return np.concatenate(parts).reshape(-1, self.draws)

    def check_steps(self, steps: int, batch_size: int) -> None:
        """Raises UserError where the spec asks for another number of training rows; most ask for none."""
        del steps, batch_size

    def follow(self, rows_RS: np.ndarray, guesses_RT: np.ndarray) -> np.ndarray:
        """Rows in which guesses that are right, but are not the row's target, have taken its place.

        Where several answers are right, repeated evaluation of what this gives ends at the answer of greedy
        decoding. Here there is one right answer, and the rows stay as they are.
        """
        return rows_RS

    def right(self, rows_RS: np.ndarray, guesses_RT: np.ndarray) -> np.ndarray:
        """Whether the answer that is complete with each target is right, bool [R, T]; others are ignored."""
        return guesses_RT == targets_of(rows_RS)

    def measures(
        self,
        rows_RS: np.ndarray,
        nats_RT: np.ndarray,
        guesses_RT: np.ndarray,
        parameters: Mapping[str, int],
    ) -> Measures:
        """Scores held-out rows.

        Args:
          rows_RS: without padding rows; of `follow`, where `guesses_RT` is.
          nats_RT: loss of every target of the rows as drawn.
          guesses_RT: most probable token at every target.
          parameters: counts of the model, "total" and "non_embedding".
        """
        targets_RT = targets_of(rows_RS)
        wrong_R = ((targets_RT >= 0) & (guesses_RT != targets_RT)).any(axis=1)
        levels = self.by_level(rows_RS, guesses_RT)
        values = {"error": float(wrong_R.mean()), "wrong": wrong_share(levels["accuracy"])}
        floor = {"wrong": wrong_share(levels["floor"])}
        if sum(levels["answers"]) == len(rows_RS):  # one answer a row
            shares = np.array(levels["answers"]) / len(rows_RS)
            floor["error"] = float(1 - shares @ levels["floor"])
        return Measures(values, floor, {"error": 0.0, "wrong": 0.0}, levels)

    def by_level(self, rows_RS: np.ndarray, guesses_RT: np.ndarray) -> dict[str, Any]:
        """`Measures.levels`."""
        level_RT, right_RT = self.levels_of(rows_RS), self.right(rows_RS, guesses_RT)
        is_answer_RT = level_RT != NO_LEVEL
        level, right = level_RT[is_answer_RT], right_RT[is_answer_RT]
        found, floors = np.unique(level).tolist(), self.floors()
        of_level = [right[level == one] for one in found]
        return {
            "name": self.level,
            "level": found,
            "accuracy": [float(of.mean()) for of in of_level],
            "floor": [floors[one] for one in found],
            "ceiling": [1.0] * len(found),
            "answers": [len(of) for of in of_level],
        }


def wrong_share(accuracies: list[float]) -> float:
    """Share of wrong answers, as a mean over levels."""
    return float(1 - np.mean(accuracies))


def at_columns(levels: np.ndarray, columns: np.ndarray, rows_RS: np.ndarray) -> np.ndarray:
    """Levels [R, T] where answers are complete at the same id columns of all rows."""
    level_T = np.full(rows_RS.shape[1] - 1, NO_LEVEL)
    level_T[columns - 1] = levels
    return np.broadcast_to(level_T, (len(rows_RS), len(level_T)))


def permutations(random_BN: np.ndarray) -> np.ndarray:
    return np.argsort(random_BN, axis=1, kind="stable")


def integers(random: np.ndarray, below: int) -> np.ndarray:
    """Maps random uint64 to int64 in [0, below); at 10**15, probabilities differ by a factor of 1 + 6e-5."""
    return (random % np.uint64(below)).astype(np.int64)
