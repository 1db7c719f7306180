"""Structure: strings of a context-free grammar, all of whose tokens are targets."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from mobilellm_jax.data.rows import targets_of
from mobilellm_jax.data.tasks.grammar import Grammar, draw_grammar
from mobilellm_jax.data.tasks.task import NO_LEVEL, Measures, Task
from mobilellm_jax.errors import UserError
from mobilellm_jax.validation import check

# Nats a token; the held-out strings' own noise is larger where a divergence is smaller.
LEAST_DIVERGENCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure(Task):
    """Strings of a grammar of levels, see `grammar.Grammar`; the task Lano of arXiv 2512.17351.

    A row is the beginning of an endless text: strings drawn one by one, a separator before each. With the
    tokens a, b, c and the separator ";":

      .; =b =a =c =c =; =a =a =c =b =; =c =a

    What comes next is often open, so that a right answer is a law. The loss minus the entropy of the true
    laws is the divergence from the grammar, 0 for a perfect model.

    Attributes:
      levels: rules from the start symbol down to a token; a string has 2^levels to 3^levels tokens.
      symbols: of every level but the first; the tokens are ids 0 to symbols - 1, the separator is the next.
      rules: of each symbol.
      grammar: seed that the rules are drawn from.
      tokens: T, tokens a row predicts.
    """

    levels: int
    symbols: int
    rules: int
    grammar: int
    tokens: int

    def __post_init__(self) -> None:
        check(1 <= self.levels <= 9, "levels", self.levels, "1 to 9")
        check(2 <= self.symbols <= 100, "symbols", self.symbols, "2 to 100")
        most = min(self.symbols + self.symbols**2, 20)
        valid = f"1 to {most}, so that no two of a level are equal"
        check(1 <= self.rules <= most, "rules", self.rules, valid)
        check(self.tokens >= 1, "tokens", self.tokens, "at least 1")
        longest = self.drawn.lengths[0][0][1]
        if longest + 1 > self.tokens:
            raise UserError(
                f"tokens: {self.tokens} is too short for the longest string of the grammar and a separator; "
                f"the smallest valid value is {longest + 1} (or lower levels={self.levels})"
            )

    @property
    def drawn(self) -> Grammar:
        return _drawn(self.levels, self.symbols, self.rules, self.grammar)

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def draws(self) -> int:
        return self._strings * self.drawn.choices

    @property
    def _strings(self) -> int:
        """As many of the shortest as a row of T + 1 ids takes."""
        return -(-(self.tokens + 1) // (self.drawn.lengths[0][0][0] + 1))

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        rows = len(random_BR)
        string_SX = self.drawn.strings(random_BR.reshape(rows * self._strings, -1))
        separator_S1 = np.full((len(string_SX), 1), self.symbols)
        text_BX = np.concatenate([separator_S1, string_SX], axis=1).reshape(rows, -1)
        starts = np.zeros(text_BX.shape, bool)
        starts[:, :: string_SX.shape[1] + 1] = True
        is_token_BX = starts | (text_BX < self.symbols)
        kept_BX = is_token_BX & (np.cumsum(is_token_BX, axis=1) <= self.tokens + 1)
        return text_BX[kept_BX].reshape(rows, self.tokens + 1)

    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        return np.full((len(rows_RS), rows_RS.shape[1] - 1), NO_LEVEL)

    def floors(self) -> dict[int, float]:
        return {}

    def measures(
        self,
        rows_RS: np.ndarray,
        nats_RT: np.ndarray,
        guesses_RT: np.ndarray,
        parameters: Mapping[str, int],
    ) -> Measures:
        """The divergence, and its logarithm, in which designs differ alike wherever they stand.

        Knowing nothing is knowing how frequent tokens are.
        """
        rows = np.ascontiguousarray(rows_RS[:, : self.tokens + 1], np.int32)
        true = -_log_probability(self, rows.tobytes(), len(rows)) / (len(rows) * self.tokens)
        divergence = float(nats_RT.sum(dtype=np.float64)) / (len(rows) * self.tokens) - true
        law = np.append(self.drawn.frequencies, 1.0)
        unigram = float(-np.log(law / law.sum())[targets_of(rows)].mean()) - true
        return Measures(
            {"divergence": divergence, "log_divergence": _log(divergence)},
            {"divergence": unigram, "log_divergence": _log(unigram)},
            {"divergence": 0.0},
        )

    def log_probability(self, rows_RS: np.ndarray) -> np.ndarray:
        """Natural logarithm of the true probability of each row's T targets, float64 [R]."""
        flat = rows_RS[:, : self.tokens + 1].reshape(-1)
        (starts,) = np.nonzero(flat == self.symbols)  # every row starts with one
        strings = np.split(flat, starts[1:])
        row_of = starts // (self.tokens + 1)
        whole = np.append(row_of[1:] == row_of[:-1], False)
        log = self.drawn.log_probabilities([string[1:] for string in strings], whole.tolist())
        return np.bincount(row_of, log, len(rows_RS))


@functools.lru_cache(maxsize=8)
def _drawn(levels: int, symbols: int, rules: int, seed: int) -> Grammar:
    return draw_grammar(levels, symbols, rules, seed)


@functools.lru_cache(maxsize=4)  # the evaluations of all runs of a process have the same rows
def _log_probability(task: Structure, rows: bytes, count: int) -> float:
    return float(task.log_probability(np.frombuffer(rows, np.int32).reshape(count, -1)).sum())


def _log(divergence: float) -> float:
    return math.log(max(divergence, LEAST_DIVERGENCE))
