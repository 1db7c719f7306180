"""Breadth: everything that a vertex of a small graph depends on."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from mobilellm_jax.data.rows import PADDING, no_target, targets_of
from mobilellm_jax.data.tasks.task import NO_LEVEL, Task, permutations
from mobilellm_jax.validation import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breadth(Task):
    """All ancestors of a vertex of an acyclic graph, parents first; the task Brevo of arXiv 2512.17351.

    The arrows from parents to children come in random order, one token each, with blanks where a vertex has
    fewer parents than it may have. Then comes a vertex, and the answer is all its ancestors in an order in
    which every parent stands before its children, and at last the vertex itself. With A to D, parents=2:

      .(A>D) .(C>B) .- .(A>C) .(D>B)  .B  =A =C =D =B

    =A =D =C =B would be right as well. The graph is drawn vertex by vertex, each with 1 to `parents` parents
    among those before it, and asked about is the last one.

    Attributes:
      vertices: n, token ids 0 to n - 1; the blank is n, arrow a>b is n + 1 + n a + b.
      parents: most of one vertex.
    """

    level: ClassVar[str] = "vertices"

    vertices: int
    parents: int

    def __post_init__(self) -> None:
        check(2 <= self.vertices <= 150, "vertices", self.vertices, "2 to 150")
        check(
            1 <= self.parents < self.vertices,
            "parents",
            self.parents,
            f"1 to {self.vertices - 1}: a graph of vertices={self.vertices} has no more edges to one of them",
        )

    @property
    def vocab_size(self) -> int:
        return self.vertices + 1 + self.vertices**2

    @property
    def edges(self) -> int:
        """E, arrows and blanks of a row."""
        return sum(min(child, self.parents) for child in range(self.vertices))

    @property
    def length(self) -> int:
        return self.edges + self.vertices

    @property
    def draws(self) -> int:
        return self.vertices * (self.vertices + 2) + self.edges

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        n, count = self.vertices, len(random_BR)
        parts = np.split(random_BR, np.cumsum([n, n, n * n]), axis=1)
        name_BN, order_BE = permutations(parts[0]), permutations(parts[3])
        number_BN = 1 + (parts[1] % np.minimum(np.maximum(np.arange(n), 1), self.parents).astype(np.uint64))
        number_BN[:, 0] = 0
        later = np.arange(n)[:, None] <= np.arange(n)  # [child, parent] that cannot be
        key_BNN = np.where(later, np.uint64(2**64 - 1), parts[2].reshape(count, n, n))
        parent_BNP = permutations(key_BNN.reshape(-1, n)).reshape(count, n, n)[:, :, : self.parents]
        is_edge_BNP = np.arange(self.parents) < number_BN[:, :, None].astype(np.int64)
        row_B = np.arange(count)
        needed_BN = np.zeros((count, n), bool)
        needed_BN[:, -1] = True
        for child in range(n - 1, 0, -1):
            for parent in range(min(child, self.parents)):
                wanted_B = needed_BN[:, child] & is_edge_BNP[:, child, parent]
                needed_BN[row_B, parent_BNP[:, child, parent]] |= wanted_B
        from_BNP = name_BN[row_B[:, None, None], parent_BNP]
        arrow_BNP = np.where(is_edge_BNP, n + 1 + n * from_BNP + name_BN[:, :, None], n)
        slots = np.arange(self.parents) < np.arange(n)[:, None]  # as many as a vertex can have
        told_BE = np.take_along_axis(arrow_BNP[:, slots], order_BE, axis=1)
        first_BN = np.argsort(~needed_BN, axis=1, kind="stable")  # those needed, in the order drawn
        is_answer_BN = np.arange(n) < needed_BN.sum(axis=1)[:, None]
        answer_BN = np.where(is_answer_BN, np.take_along_axis(name_BN, first_BN, axis=1), PADDING)
        return np.concatenate([no_target(told_BE), no_target(name_BN[:, -1:]), answer_BN], axis=1)

    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        """The number of vertices of a whole answer, at its last one."""
        is_target_RT = targets_of(rows_RS) >= 0
        number_R1 = is_target_RT.sum(axis=1)[:, None]
        is_last_RT = np.arange(is_target_RT.shape[1]) == self.edges + number_R1 - 1
        return np.where(is_last_RT, number_R1, NO_LEVEL)

    def right(self, rows_RS: np.ndarray, guesses_RT: np.ndarray) -> np.ndarray:
        targets_RT = targets_of(rows_RS)
        ok_R1 = ((targets_RT < 0) | (guesses_RT == targets_RT)).all(axis=1)[:, None]
        return np.broadcast_to(ok_R1, targets_RT.shape)

    def follow(self, rows_RS: np.ndarray, guesses_RT: np.ndarray) -> np.ndarray:
        """At the first guess that is not the target but may come next, moves it there from further on.

        The rest keeps its order, and so stays valid. Repeated until nothing changes, with the guesses for
        the changed rows, this gives rows whose first wrong guess, if there is one, no valid order continues:
        a row is right exactly where greedy decoding gives an answer in some valid order.
        """
        n, rows, start = self.vertices, np.arange(len(rows_RS))[:, None], self.edges + 1
        answer_RN = rows_RS[:, start : start + n]
        guess_RN = guesses_RT[:, start - 1 : start - 1 + n]
        differs_RN = (answer_RN >= 0) & (guess_RN != answer_RN)
        at_R1 = differs_RN.argmax(axis=1)[:, None]
        guess_R1 = np.take_along_axis(guess_RN, at_R1, axis=1)
        from_R1 = (answer_RN == guess_R1).argmax(axis=1)[:, None]  # 0 where it is not there
        place_RN = np.full((len(rows_RS), n), n)  # of each vertex in the answer
        there = np.nonzero(answer_RN >= 0)
        place_RN[there[0], answer_RN[there]] = there[1]
        arrow_RE = ~rows_RS[:, : self.edges] - n - 1  # -1 at blanks
        into_guess_RE = (arrow_RE >= 0) & (arrow_RE % n == guess_R1)
        parents_RE = np.where(into_guess_RE, place_RN[rows, np.maximum(arrow_RE, 0) // n], -1)
        ready_R1 = parents_RE.max(axis=1)[:, None] < at_R1
        may_R1 = differs_RN.any(axis=1)[:, None] & (from_R1 > at_R1) & ready_R1
        place_N = np.arange(n)
        later_RN = np.where((place_N > at_R1) & (place_N <= from_R1), place_N - 1, place_N)
        moved_RN = np.where(place_N == at_R1, from_R1, later_RN)
        answer_RN = np.take_along_axis(answer_RN, np.where(may_R1, moved_RN, place_N), axis=1)
        return np.concatenate([rows_RS[:, :start], answer_RN, rows_RS[:, start + n :]], axis=1)

    def floors(self) -> dict[int, float]:
        """Share of the commonest answer of m vertices, as drawn: m - 1 others, then the one asked about."""
        others = self.vertices - 1
        return {m: 1 / math.perm(others, m - 1) for m in range(1, self.vertices + 1)}
