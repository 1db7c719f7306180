"""Associative recall with several queries."""

import dataclasses
from typing import ClassVar

import numpy as np

from mobilellm_jax.data.rows import no_target
from mobilellm_jax.data.tasks.task import Task, at_columns, integers, permutations
from mobilellm_jax.validation import check


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

    level: ClassVar[str] = "pairs"

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
        key_BP = permutations(random_BR[:, :n])[:, :pairs]
        value_BP = integers(random_BR[:, n : n + pairs], n)
        asked_BQ = permutations(random_BR[:, n + pairs :])[:, : self.queries]
        key_BQ, value_BQ = (np.take_along_axis(x_BP, asked_BQ, axis=1) for x_BP in (key_BP, value_BP))
        pairs_BQ2 = np.stack([no_target(key_BQ), n + value_BQ], axis=2)
        told_BP = no_target(2 * n + n * key_BP + value_BP)
        return np.concatenate([told_BP, pairs_BQ2.reshape(len(told_BP), -1)], axis=1)

    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        columns = self.pairs + 1 + 2 * np.arange(self.queries)
        return at_columns(np.full(self.queries, self.pairs), columns, rows_RS)

    def floors(self) -> dict[int, float]:
        """Share of one value: values are drawn alike, whatever the key."""
        return {self.pairs: 1 / self.symbols}
