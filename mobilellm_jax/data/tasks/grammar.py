"""Context-free grammars of levels: drawn from a seed, sampled, and the exact probabilities of their strings.

A symbol of one level becomes two or three symbols of the next, by one of its rules, all equally likely; the
symbols of the last level are the tokens. So every string has finitely many derivations, and the inside
algorithm adds up all of them, however ambiguous the grammar is.

Letters: S strings, N tokens in the longest. In arrays of spans, [s, i, l] is the part of string s that has
l tokens from token i on.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from mobilellm_jax.data.tasks.task import Stream

Rule = tuple[int, ...]  # symbols of the next level
_CHUNK = 1 << 24  # spans computed at a time, 8 bytes each


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A grammar of levels.

    Attributes:
      rules: by level, then by symbol, its right-hand sides. Level 0 has one symbol, the start.
      symbols: number of tokens, as of the symbols of all other levels.
    """

    rules: tuple[tuple[tuple[Rule, ...], ...], ...]
    symbols: int

    @property
    def choices(self) -> int:
        """Places of a rule in the largest derivation."""
        return (3 ** len(self.rules) - 1) // 2

    @functools.cached_property
    def lengths(self) -> list[list[tuple[int, int]]]:
        """Tokens of the shortest and of the longest string, by level and symbol; last come the tokens."""
        found = [[(1, 1)] * self.symbols]
        for level in reversed(self.rules):
            below = found[0]
            sums = [
                [(sum(below[y][0] for y in rule), sum(below[y][1] for y in rule)) for rule in of_symbol]
                for of_symbol in level
            ]
            found.insert(0, [(min(low for low, _ in s), max(high for _, high in s)) for s in sums])
        return found

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """Expected number of each token in a string, [symbols]."""
        expected = np.ones(1)
        for level in self.rules:
            below = np.zeros(self.symbols)
            for weight, of_symbol in zip(expected, level, strict=True):
                for rule in of_symbol:
                    np.add.at(below, list(rule), weight / len(of_symbol))
            expected = below
        return expected

    def strings(self, random_SC: np.ndarray) -> np.ndarray:
        """Strings [S, 3 ** levels] from random uint64 [S, choices]; `symbols` where there is no token."""
        symbol_SX, start = np.zeros((len(random_SC), 1), np.int64), 0
        for depth, level in enumerate(self.rules):
            table = np.full((self.symbols + 1, len(level[0]), 3), self.symbols)
            for symbol, of_symbol in enumerate(level):
                for place, rule in enumerate(of_symbol):
                    table[symbol, place, : len(rule)] = rule
            choice = random_SC[:, start : start + 3**depth] % np.uint64(len(level[0]))
            symbol_SX = table[symbol_SX, choice.astype(np.int64)].reshape(len(random_SC), -1)
            start += 3**depth
        return symbol_SX

    def log_probabilities(self, strings: Sequence[np.ndarray], whole: Sequence[bool]) -> np.ndarray:
        """Natural logarithm of the probability of each string, float64 [S].

        That of strings that are not `whole` is the probability to begin so; they end before their last token.
        """
        found = np.zeros(len(strings))
        asked = [i for i, string in enumerate(strings) if len(string) or whole[i]]
        longest = max((len(strings[i]) for i in asked), default=0)
        spans = (longest + 1) * (min(longest, self.lengths[min(1, len(self.rules))][0][1]) + 1) * self.symbols
        size = max(1, _CHUNK // spans)
        for start in range(0, len(asked), size):
            some = asked[start : start + size]
            found[some] = self._log_probabilities(
                [strings[i] for i in some], np.array([whole[i] for i in some])
            )
        return found

    def next_law(self, prefix: Sequence[int]) -> np.ndarray:
        """Probability of each token after the tokens of a string, and last of the end: float64 [symbols + 1].

        Raises:
          ValueError: no string begins so.
        """
        ahead = [np.array([*prefix, token]) for token in range(self.symbols)]
        log = self.log_probabilities([*ahead, np.array(prefix, int)], [False] * self.symbols + [True])
        law = np.exp(log)
        if not law.sum():
            raise ValueError(f"no string of the grammar begins with {list(prefix)}")
        return law / law.sum()

    def _log_probabilities(self, strings: Sequence[np.ndarray], whole: np.ndarray) -> np.ndarray:
        length_S = np.array([len(string) for string in strings])
        count, longest = len(strings), int(length_S.max())
        token_SN = np.full((count, longest + 1), -1)  # a place more, where only the end is
        token_SN[np.arange(longest + 1) < length_S[:, None]] = np.concatenate(strings)
        # Every token counts this much more, so that long strings do not underflow.
        scale = self._scale
        inside: list[np.ndarray] = []
        begins: list[np.ndarray] = []
        is_last_SN = np.arange(longest + 1) == length_S[:, None] - 1
        for token in range(self.symbols):
            match_SN = np.where(token_SN == token, scale, 0.0)
            inside.append(np.stack([np.zeros_like(match_SN), match_SN], axis=2))
            begins.append(match_SN * is_last_SN)
        for depth, level in reversed([*enumerate(self.rules)]):
            starts = longest + 1 if depth else 1
            both = [self._symbol(of_symbol, inside, begins, starts, longest) for of_symbol in level]
            inside, begins = [i for i, _ in both], [b for _, b in both]
        ((of_whole, of_begin),) = zip(inside, begins, strict=True)
        at_length = np.minimum(length_S, of_whole.shape[2] - 1)
        fits = at_length == length_S
        p_S = np.where(whole, np.where(fits, of_whole[np.arange(count), 0, at_length], 0.0), of_begin[:, 0])
        with np.errstate(divide="ignore"):
            return np.log(p_S) - length_S * math.log(scale)

    @property
    def _scale(self) -> float:
        """exp of the entropy of a derivation's choices, for each of its tokens."""
        expected, choices = np.ones(1), 0.0
        for level in self.rules:
            choices += expected.sum() * math.log(len(level[0]))
            below = np.zeros(self.symbols)
            for weight, of_symbol in zip(expected, level, strict=True):
                for rule in of_symbol:
                    np.add.at(below, list(rule), weight / len(of_symbol))
            expected = below
        return math.exp(choices / expected.sum())

    def _symbol(
        self,
        rules: Iterable[Rule],
        inside: Sequence[np.ndarray],
        begins: Sequence[np.ndarray],
        starts: int,
        longest: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of one symbol: probabilities of all spans, and to begin like the rest of the string from i on."""
        rules = list(rules)
        most = min(max(sum(inside[y].shape[2] - 1 for y in rule) for rule in rules), longest)
        spans = np.zeros((len(inside[0]), starts, most + 1))
        begin = np.zeros((len(inside[0]), starts))
        for rule in rules:
            first, *others = rule
            covered = inside[first][:, :starts]
            begin += begins[first][:, :starts]
            for child in others:  # the first child that reaches the end of the string is this one
                begin += _then_begins(covered, begins[child])
                covered = _joined(covered, inside[child], most)
            spans[:, :, : covered.shape[2]] += covered
        return spans / len(rules), begin / len(rules)


def _joined(first: np.ndarray, second: np.ndarray, most: int) -> np.ndarray:
    """Sum over all ways to cut a span, of at most `most` tokens, in two."""
    (count, starts, of_first), of_second = first.shape, second.shape[2]
    joined = np.zeros((count, starts, min(of_first + of_second - 2, most) + 1))
    for length in range(1, of_first):
        here, room = min(starts, second.shape[1] - length), min(of_second, joined.shape[2] - length)
        if here <= 0 or room <= 0 or not first[:, :here, length].any():
            continue
        rest = second[:, length : length + here, :room]
        joined[:, :here, length : length + room] += first[:, :here, length, None] * rest
    return joined


def _then_begins(covered: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Sum over all lengths of a span, where what follows reaches the end: [S, starts]."""
    found = np.zeros(covered.shape[:2])
    for length in range(1, covered.shape[2]):
        here = min(covered.shape[1], begins.shape[1] - length)
        if here > 0:
            found[:, :here] += covered[:, :here, length] * begins[:, length : length + here]
    return found


def draw_grammar(levels: int, symbols: int, rules: int, seed: int) -> Grammar:
    """Draws rules of two or three symbols, one as likely as the other; no two of a level are equal.

    At most (symbols^2 + symbols^3) / symbols rules a symbol can be told apart.
    """
    numbers, place = Stream(seed, _GRAMMAR).numbers(_AT_A_TIME, 0).tolist(), 0
    part = 0

    def draw(below: int) -> int:
        nonlocal numbers, place, part
        if place == len(numbers):
            part, place = part + 1, 0
            numbers = Stream(seed, _GRAMMAR).numbers(_AT_A_TIME, part).tolist()
        place += 1
        return numbers[place - 1] % below

    drawn = []
    for level in range(levels):
        taken: set[Rule] = set()
        of_level = []
        for _ in range(1 if level == 0 else symbols):
            of_symbol: list[Rule] = []
            while len(of_symbol) < rules:
                rule = tuple(draw(symbols) for _ in range(2 + draw(2)))
                if rule not in taken:
                    taken.add(rule)
                    of_symbol.append(rule)
            of_level.append(tuple(of_symbol))
        drawn.append(tuple(of_level))
    return Grammar(tuple(drawn), symbols)


_GRAMMAR = 3  # its key, beside those of the splits
_AT_A_TIME = 256
