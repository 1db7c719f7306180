"""Manipulation: nested arithmetic modulo a prime."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from mobilellm_jax.data.rows import asked, no_target, targets_of
from mobilellm_jax.data.tasks.task import NO_LEVEL, Task, integers, permutations
from mobilellm_jax.errors import UserError
from mobilellm_jax.validation import check

OPERATORS = "+-*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manipulation(Task):
    """Expressions modulo a prime in postfix, with an answer at every operator; Mano of arXiv 2512.17351.

    There, expressions are in prefix and have one answer, which models of a few ten thousand parameters
    hardly learn. Here every operator asks for the value of what it ends, and the answer is no input, so that
    the work below an operator is done anew at each. (3 + 4) * (2 - 1) modulo 5, with answers below:

      3 4 + 2 1 - *
          2     1 2

    The shape of an expression is uniform over all binary trees with its number of operators.

    Attributes:
      modulus: p, a prime, so that no factor but 0 loses information; numbers are token ids 0 to p - 1.
      operations: operators of a row's expression; answers are counted by the operators in what they end.
      operators: 1 to 3, the first of + - *; their token ids follow the numbers'.
    """

    level: ClassVar[str] = "operations"

    modulus: int
    operations: int
    operators: int

    def __post_init__(self) -> None:
        check(2 <= self.modulus <= 1000, "modulus", self.modulus, "a prime from 2 to 1000")
        if not _is_prime(self.modulus):
            near = [p for p in range(2, 2 * self.modulus) if _is_prime(p)]
            nearest = min(near, key=lambda p: abs(p - self.modulus))
            raise UserError(f"modulus: {self.modulus} is not a prime; the nearest one is {nearest}")
        check(1 <= self.operations <= 500, "operations", self.operations, "1 to 500")
        check(1 <= self.operators <= 3, "operators", self.operators, f"1 to 3, the first of {OPERATORS}")

    @property
    def vocab_size(self) -> int:
        return self.modulus + self.operators

    @property
    def length(self) -> int:
        return 2 * self.operations + 1

    @property
    def draws(self) -> int:
        return 2 * self.length

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        length = self.length
        # Of all rotations of a sequence with a number more than operators, one is an expression: the one
        # that starts after the last minimum of numbers minus operators (Dvoretzky and Motzkin's cycle lemma).
        is_operator_BN = permutations(random_BR[:, :length]) > self.operations
        excess_BN = np.cumsum(np.where(is_operator_BN, -1, 1), axis=1)
        start_B1 = length - np.argmin(excess_BN[:, ::-1], axis=1)[:, None]
        is_operator_BN = np.take_along_axis(is_operator_BN, (start_B1 + np.arange(length)) % length, axis=1)
        random_BN = random_BR[:, length:]
        operator_BN = self.modulus + integers(random_BN, self.operators)
        token_BN = np.where(is_operator_BN, operator_BN, integers(random_BN, self.modulus))
        value_BN = self._values(token_BN)
        before_BN, after_BN = is_operator_BN[:, :-1], token_BN[:, 1:]
        inner = np.where(before_BN, asked(after_BN, value_BN[:, :-1]), no_target(after_BN))
        return np.concatenate([no_target(token_BN[:, :1]), inner, value_BN[:, -1:]], axis=1)

    def _values(self, token_BN: np.ndarray) -> np.ndarray:
        """Value of what each token ends, [B, N]."""
        token_NB = np.ascontiguousarray(token_BN.T)
        is_operator_NB, p = token_NB >= self.modulus, self.modulus
        results, first_NB = np.ravel(_tables(p)), (token_NB - p) * p * p

        def value(step: int, left_B: np.ndarray, right_B: np.ndarray) -> np.ndarray:
            found_B = results.take(first_NB[step] + left_B * p + right_B, mode="clip")
            return np.where(is_operator_NB[step], found_B, token_NB[step])

        return _folded(is_operator_NB, value)

    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        level_RT = np.full((len(rows_RS), rows_RS.shape[1] - 1), NO_LEVEL)
        is_answer_RN = targets_of(rows_RS[:, : self.length + 1]) >= 0  # at every operator, and nowhere else
        is_answer_NR = np.ascontiguousarray(is_answer_RN.T)

        def operators(step: int, left_R: np.ndarray, right_R: np.ndarray) -> np.ndarray:
            return np.where(is_answer_NR[step], left_R + right_R + 1, 0)

        size_RN = _folded(is_answer_NR, operators)
        level_RT[:, : self.length] = np.where(is_answer_RN, size_RN, NO_LEVEL)
        return level_RT

    def floors(self) -> dict[int, float]:
        """Share of the commonest value by number of operations: the exact law, from that of smaller ones."""
        return _floors(self.modulus, self.operations, self.operators)


def _folded(
    is_operator_NB: np.ndarray, combine: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """What `combine` gives for each token of postfix expressions, [B, N]; by a stack for each expression.

    It gets the step and, of every expression, what the two uppermost places of the stack hold after an
    operator took them off.
    """
    length, count = is_operator_NB.shape
    depth_NB = np.cumsum(np.where(is_operator_NB, -1, 1), axis=0) - 1  # place on the stack of the result
    place_NB = depth_NB * count + np.arange(count)
    stack, result_NB = np.zeros((length + 1) * count, np.int64), np.empty((length, count), np.int64)
    for step, place in enumerate(place_NB):
        stack[place] = result_NB[step] = combine(step, stack[place], stack[place + count])
    return result_NB.T


@functools.lru_cache(maxsize=8)
def _tables(modulus: int) -> np.ndarray:
    """Results of + - *, by left and right operand: [3, p, p]."""
    value = np.arange(modulus)
    left = value[:, None]
    return np.stack([left + value, left - value, left * value]) % modulus


@functools.lru_cache(maxsize=8)
def _floors(modulus: int, operations: int, operators: int) -> dict[int, float]:
    tables = _tables(modulus)
    laws, trees = [np.full(modulus, 1 / modulus)], [1]
    for size in range(1, operations + 1):
        trees.append(math.comb(2 * size, size) // (size + 1))
        # A tree of this size has `left` operators on the left with a share of trees of both sides.
        shares = [trees[left] * trees[size - 1 - left] / trees[size] for left in range(size)]
        both = sum(share * np.outer(laws[left], laws[size - 1 - left]) for left, share in enumerate(shares))
        law = np.zeros(modulus)
        for table in tables[:operators]:
            law += np.bincount(table.ravel(), np.ravel(both), modulus) / operators
        laws.append(law)
    return {size: float(law.max()) for size, law in enumerate(laws) if size}


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
