"""Pointer chasing: hops, named khop in a spec."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from mobilellm_jax.data.rows import no_target
from mobilellm_jax.data.tasks.task import Task, at_columns, permutations
from mobilellm_jax.validation import check


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
      tokens_per_node: 1, or 2: then a symbol is two tokens, its number's digits to the smallest base b with
        b^2 >= symbols, and an arrow four. First digits are token ids 0 to b - 1, second ones b to 2b - 1, the
        mark is 2b. Symbols must then be put together before they are looked up; an answer is both digits.
    """

    level: ClassVar[str] = "hops"

    hops: int
    min_hops: int
    symbols: int
    queries: int
    tokens_per_node: int = 1

    def __post_init__(self) -> None:
        check(1 <= self.min_hops <= self.hops, "min_hops", self.min_hops, f"1 to hops={self.hops}")
        check(self.symbols > 2 * self.hops, "symbols", self.symbols, f"more than 2 hops={2 * self.hops}")
        check(1 <= self.queries <= self.symbols, "queries", self.queries, f"1 to symbols={self.symbols}")
        check(self.tokens_per_node in (1, 2), "tokens_per_node", self.tokens_per_node, "1 or 2")

    @property
    def vocab_size(self) -> int:
        return self._mark + 1 + (self.symbols**2 if self.tokens_per_node == 1 else 0)

    @property
    def length(self) -> int:
        sections, two = len(self._sections), self.tokens_per_node == 2
        marks = sections * (self.hops + self.min_hops) // 2
        told = self.symbols * (4 if two else 1)
        return told + marks + 2 * self.queries * sections * self.tokens_per_node - 1

    @property
    def draws(self) -> int:
        return self.symbols * (2 + len(self._sections))

    @property
    def _sections(self) -> range:
        return range(self.hops, self.min_hops - 1, -1)

    @property
    def _base(self) -> int:
        return math.isqrt(self.symbols - 1) + 1

    @property
    def _mark(self) -> int:
        return self.symbols if self.tokens_per_node == 1 else 2 * self._base

    def _tokens(self, symbol_BN: np.ndarray) -> np.ndarray:
        """Tokens [B, N * tokens_per_node] of symbols."""
        if self.tokens_per_node == 1:
            return symbol_BN
        first_BN, second_BN = np.divmod(symbol_BN, self._base)
        return np.stack([first_BN, self._base + second_BN], axis=2).reshape(len(symbol_BN), -1)

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        n, each = self.symbols, self.tokens_per_node
        cycle_BN, order_BN, *asked = (
            permutations(random_BR[:, start : start + n]) for start in range(0, self.draws, n)
        )

        def on_cycle(place_BQ: np.ndarray) -> np.ndarray:
            return np.take_along_axis(cycle_BN, place_BQ % n, axis=1)

        from_BN, to_BN = on_cycle(order_BN), on_cycle(order_BN + 1)
        if each == 1:
            told = n + 1 + n * from_BN + to_BN
        else:
            told = self._tokens(np.stack([from_BN, to_BN], axis=2).reshape(len(from_BN), -1))
        parts = [no_target(told)]
        for k, asked_BN in zip(self._sections, asked, strict=True):
            place_BQ = asked_BN[:, : self.queries]
            question, answer = (
                self._tokens(on_cycle(place)).reshape(len(place), -1, each)
                for place in (place_BQ, place_BQ + k)
            )
            pairs = np.concatenate([no_target(question), answer], axis=2)
            parts += [np.full((len(place_BQ), k), no_target(self._mark)), pairs.reshape(len(place_BQ), -1)]
        return np.concatenate(parts, axis=1)

    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        each = self.tokens_per_node
        start, levels, columns = self.symbols * (4 if each == 2 else 1), [], []
        for k in self._sections:
            levels += [k] * self.queries
            columns += [start + k + 2 * each * (1 + query) - 1 for query in range(self.queries)]
            start += k + 2 * each * self.queries
        return at_columns(np.array(levels), np.array(columns), rows_RS)

    def right(self, rows_RS: np.ndarray, guesses_RT: np.ndarray) -> np.ndarray:
        right_RT = super().right(rows_RS, guesses_RT)
        if self.tokens_per_node == 2:
            right_RT[:, 1:] &= right_RT[:, :-1].copy()  # an answer is complete with its second digit
        return right_RT

    def floors(self) -> dict[int, float]:
        """One of all symbols but the one asked about, to which no number of hops leads back."""
        return dict.fromkeys(self._sections, 1 / (self.symbols - 1))
