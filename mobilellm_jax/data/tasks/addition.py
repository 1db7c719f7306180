"""Addition of several numbers."""

import dataclasses
from typing import ClassVar

import numpy as np

from mobilellm_jax.data.rows import no_target
from mobilellm_jax.data.tasks.task import Task, at_columns, integers
from mobilellm_jax.validation import check


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

    level: ClassVar[str] = "place of the digit"

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
        number_BR = integers(random_BR, 10**self.digits)
        sign_BR1 = np.full((*number_BR.shape, 1), 10)
        sign_BR1[:, -1] = 11
        problem_BRD = np.concatenate([_digits(number_BR, self.digits), sign_BR1], axis=2)
        answer_BD = _digits(number_BR.sum(axis=1), self._sum_digits)
        return np.concatenate([no_target(problem_BRD.reshape(len(number_BR), -1)), answer_BD], axis=1)

    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        places = np.arange(self._sum_digits)
        return at_columns(1 + places, self.operands * (self.digits + 1) + places, rows_RS)

    def floors(self) -> dict[int, float]:
        """Share of the commonest digit at each place: the exact distribution of carries, place by place."""
        carries, found = np.ones(1), {}
        for place in range(self._sum_digits):
            total = carries
            for _ in range(self.operands if place < self.digits else 0):
                total = np.convolve(total, np.full(10, 0.1))
            total = np.pad(total, (0, -len(total) % 10)).reshape(-1, 10)  # carry, digit
            found[1 + place] = float(total.sum(axis=0).max())
            carries = total.sum(axis=1)
        return found


def _digits(numbers: np.ndarray, count: int) -> np.ndarray:
    """Decimal digits [..., count], least significant first."""
    return numbers[..., None] // 10 ** np.arange(count) % 10
