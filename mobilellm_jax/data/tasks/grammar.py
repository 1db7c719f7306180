"""Context-free grammars of levels: drawn from a seed, sampled, and the exact probabilities of their strings.

A symbol of one level becomes two or three symbols of the next, by one of its rules, all equally likely; the
symbols of the last level are the tokens. So every string has finitely many derivations, and the inside
algorithm adds up all of them, however ambiguous the grammar is.

Letters: S strings, N places in all of them together, those of the ends included.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from mobilellm_jax.data.tasks.task import Stream

Rule = tuple[int, ...]  # symbols of the next level
_CHUNK = 1 << 20  # strings taken at a time, times the square of their length: spans there could be


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
        size = max(1, _CHUNK // (longest + 1) ** 2)
        for start in range(0, len(asked), size):
            some = asked[start : start + size]
            found[some] = self._log_probabilities(
                [strings[i] for i in some], np.array([whole[i] for i in some])
            )
        return found

    def parse(self, strings: Sequence[np.ndarray]) -> np.ndarray:
        """Whether each string has a derivation, bool [S]; one with another id than a token has none."""
        known = [i for i, s in enumerate(strings) if len(s) and s.min() >= 0 and s.max() < self.symbols]
        found = np.zeros(len(strings), bool)
        found[known] = np.isfinite(self.log_probabilities([strings[i] for i in known], [True] * len(known)))
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
        first_S = np.cumsum(length_S + 1) - length_S - 1  # after each string, the place of its end
        token_N = np.full(int((length_S + 1).sum()), -1)
        is_end_N = np.zeros(len(token_N), bool)
        is_end_N[first_S + length_S] = True
        token_N[~is_end_N] = np.concatenate(strings)
        # Every token counts this much more, so that long strings do not underflow.
        scale = self._scale
        inside, begins = [], []
        is_last_N = np.append(is_end_N[1:], False)
        for token in range(self.symbols):
            (start,) = np.nonzero(token_N == token)
            inside.append(_Spans(start, start + 1, np.full(len(start), scale)))
            begins.append(np.where((token_N == token) & is_last_N, scale, 0.0))
        for depth, level in reversed([*enumerate(self.rules)]):
            starts = None if depth else first_S
            both = [_symbol(of_symbol, inside, begins, starts) for of_symbol in level]
            inside, begins = [spans for spans, _ in both], [begin for _, begin in both]
        ((spans,), (begin_N,)) = inside, begins
        of_whole_S = spans.probability(first_S, first_S + length_S)
        with np.errstate(divide="ignore"):
            return np.log(np.where(whole, of_whole_S, begin_N[first_S])) - length_S * math.log(scale)

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


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Parts of strings that a symbol can become, in order of `start`; places count through all strings.

    There are few of them where a grammar is hardly ambiguous, so that long strings are cheap.
    """

    start: np.ndarray
    end: np.ndarray
    p: np.ndarray

    def probability(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Probability of spans, 0 for those that are not here."""
        found = np.zeros(len(start))
        size = int(max(end.max(), self.end.max(initial=0))) + 1
        keys, wanted = self.start * size + self.end, start * size + end
        place = np.searchsorted(keys, wanted)
        there = place < len(keys)
        there[there] = keys[place[there]] == wanted[there]
        found[there] = self.p[place[there]]
        return found


def _symbol(
    rules: Sequence[Rule],
    inside: Sequence[_Spans],
    begins: Sequence[np.ndarray],
    starts: np.ndarray | None,
) -> tuple[_Spans, np.ndarray]:
    """Of one symbol: its spans, and the probability to begin like the rest of a string from each place on.

    Of its children come both; only spans from `starts` on are wanted, if it is given.
    """
    found, begin_N = [], np.zeros(len(begins[0]))
    for rule in rules:
        covered = inside[rule[0]]
        if starts is not None:
            here = np.isin(covered.start, starts)
            covered = _Spans(covered.start[here], covered.end[here], covered.p[here])
        begin_N += begins[rule[0]]
        for child in rule[1:]:  # the first child that reaches the end of the string is this one
            weights = covered.p * begins[child][covered.end]
            begin_N += np.bincount(covered.start, weights, len(begin_N))
            covered = _joined(covered, inside[child])
        found.append(covered)
    return _added(found, 1 / len(rules)), begin_N / len(rules)


def _joined(first: _Spans, second: _Spans) -> _Spans:
    """All spans made of one of each, without adding up those that are made in several ways."""
    low, high = (np.searchsorted(second.start, first.end, side) for side in ("left", "right"))
    count = high - low
    of_first = np.repeat(np.arange(len(count)), count)
    of_second = np.arange(len(of_first)) + np.repeat(low - np.cumsum(count) + count, count)
    return _Spans(first.start[of_first], second.end[of_second], first.p[of_first] * second.p[of_second])


def _added(parts: Sequence[_Spans], factor: float) -> _Spans:
    """All spans of `parts`, each once."""
    names = ("start", "end", "p")
    start, end, p = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    size = int(end.max(initial=0)) + 1
    keys, place = np.unique(start * size + end, return_inverse=True)
    return _Spans(keys // size, keys % size, np.bincount(place, p, len(keys)) * factor)


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
