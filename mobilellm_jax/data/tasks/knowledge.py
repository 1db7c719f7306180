"""Knowledge: facts about people that can only be remembered."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mobilellm_jax.data.rows import no_target, targets_of
from mobilellm_jax.data.tasks.task import Measures, Stream, Task, at_columns, integers, permutations
from mobilellm_jax.errors import UserError
from mobilellm_jax.validation import check

NAME = 3  # tokens
_TABLE = 4  # key of the people, beside those of the splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knowledge(Task):
    """People with attributes, told again and again in other words; the task Capo of arXiv 2512.17351.

    A row tells of one person: a name of three tokens, and then all attributes in random order, a word for
    each and its value. With two, the words u v for the first and w x for the second, and the values 0 to 9:

      .A .C .B .x =2 .u =7

    Names and values are drawn once, from the numbers of the spec alone, each value as likely as another. So
    a model that knows nothing pays log2(values) bits a value, and what it pays less in all is what it has
    learned: nothing else helps. The seed of the data decides who comes when, a permutation of all people in
    each pass, in which words and order. Held out are these alone: every split asks for all people in turn.

    Attributes:
      people: in all; evaluate as many rows, and each is asked about once.
      attributes: of each person; answers are counted by their place in the row.
      values: of each attribute, token ids 0 to values - 1.
      wordings: words for each attribute, the next attributes x wordings ids.
      symbols: tokens that names consist of, the last ids.
      exposures: times that training tells of each person. Steps times rows are people times exposures,
        rounded up to whole steps, or the run is refused.
    """

    level: ClassVar[str] = "place"
    unhashed: ClassVar[tuple[str, ...]] = ("exposures",)

    people: int
    attributes: int
    values: int
    wordings: int
    symbols: int
    exposures: int

    def __post_init__(self) -> None:
        check(1 <= self.people <= 10_000_000, "people", self.people, "1 to 10000000")
        check(1 <= self.attributes <= 1000, "attributes", self.attributes, "1 to 1000")
        check(2 <= self.values <= 100_000, "values", self.values, "2 to 100000")
        check(1 <= self.wordings <= 1000, "wordings", self.wordings, "1 to 1000")
        check(1 <= self.symbols <= 100_000, "symbols", self.symbols, "1 to 100000")
        check(self.exposures >= 1, "exposures", self.exposures, "at least 1")
        if self.people > self.symbols**NAME:
            symbols = next(s for s in range(self.symbols, self.people + 1) if s**NAME >= self.people)
            raise UserError(
                f"people: {self.people} are more than the {self.symbols**NAME} names of {NAME} tokens of "
                f"symbols={self.symbols}; symbols={symbols} would do"
            )

    @property
    def vocab_size(self) -> int:
        return self.values + self.attributes * self.wordings + self.symbols

    @property
    def length(self) -> int:
        return NAME + 2 * self.attributes - 1

    @property
    def draws(self) -> int:
        return 2 * self.attributes

    @property
    def total_bits(self) -> float:
        return self.people * self.attributes * math.log2(self.values)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Names [people, 3], all different, and values [people, attributes]."""
        return _table(self.people, self.attributes, self.values, self.symbols)

    def rows(self, random_BR: np.ndarray) -> np.ndarray:
        """Rows of the first people of the table."""
        return self._told(np.arange(len(random_BR)) % self.people, random_BR)

    def batches(self, stream: Stream, count: int, numbers: Sequence[int]) -> np.ndarray:
        place = np.concatenate([number * count + np.arange(count) for number in numbers])
        passes, place = np.divmod(place, self.people)
        person = np.empty(len(place), np.int64)
        for one in np.unique(passes).tolist():
            here = passes == one
            person[here] = _order(stream, one, self.people)[place[here]]
        return self._told(person, self.random(stream, count, numbers))

    def _told(self, person_B: np.ndarray, random_BR: np.ndarray) -> np.ndarray:
        names, facts = self.table()
        order_BA = permutations(random_BR[:, : self.attributes])
        wording_BA = integers(random_BR[:, self.attributes :], self.wordings)
        word_BA = self.values + order_BA * self.wordings + wording_BA
        name_BN = self.vocab_size - self.symbols + names[person_B]
        pair_BA2 = np.stack([no_target(word_BA), facts[person_B[:, None], order_BA]], axis=2)
        return np.concatenate([no_target(name_BN), pair_BA2.reshape(len(person_B), -1)], axis=1)

    def check_steps(self, steps: int, batch_size: int) -> None:
        rows = self.people * self.exposures
        if steps != (wanted := -(-rows // batch_size)):
            times = steps * batch_size / self.people
            raise UserError(
                f"train.steps: {steps} steps of {batch_size} rows tell of each of {self.people} people "
                f"{times:.4g} times, but data.source has exposures={self.exposures}; use train.steps={wanted}"
            )

    def levels_of(self, rows_RS: np.ndarray) -> np.ndarray:
        place = np.arange(self.attributes)
        return at_columns(1 + place, NAME + 1 + 2 * place, rows_RS)

    def floors(self) -> dict[int, float]:
        return dict.fromkeys(range(1, self.attributes + 1), 1 / self.values)

    def measures(
        self,
        rows_RS: np.ndarray,
        nats_RT: np.ndarray,
        guesses_RT: np.ndarray,
        parameters: Mapping[str, int],
    ) -> Measures:
        """Bits learned about all people, from those asked about; negative for a model worse than a guess."""
        targets = int((targets_of(rows_RS) >= 0).sum())
        bits_each = float(nats_RT.sum(dtype=np.float64)) / targets / math.log(2)
        forgotten = bits_each / math.log2(self.values)
        bits = self.total_bits * (1 - forgotten)
        values = {
            "bits": bits,
            "bits_per_parameter": bits / parameters["total"],
            "bits_per_non_embedding_parameter": bits / parameters["non_embedding"],
            "forgotten": forgotten,
        }
        of_all = super().measures(rows_RS, nats_RT, guesses_RT, parameters)
        return Measures(
            values | {"wrong": of_all.values["wrong"]},
            {"bits": 0.0, "forgotten": 1.0, "wrong": of_all.floor["wrong"]},
            {"bits": self.total_bits, "forgotten": 0.0, "wrong": 0.0},
            of_all.levels,
        )


@functools.lru_cache(maxsize=4)
def _table(people: int, attributes: int, values: int, symbols: int) -> tuple[np.ndarray, np.ndarray]:
    stream, part, found = Stream(0, _TABLE), 0, np.empty(0, np.int64)
    while len(found) < people:  # names drawn before are left out
        drawn = integers(stream.numbers(2 * people, part), symbols**NAME)
        every = np.concatenate([found, drawn])
        _, first = np.unique(every, return_index=True)
        found, part = every[np.sort(first)][:people], part + 1
    names = found[:, None] // symbols ** np.arange(NAME - 1, -1, -1) % symbols
    facts = integers(stream.numbers(people * attributes, 0, kind=1), values).reshape(people, attributes)
    return names, facts


@functools.lru_cache(maxsize=4)
def _order(stream: Stream, number: int, people: int) -> np.ndarray:
    """Order of the people in one pass over them."""
    return permutations(stream.numbers(people, number, kind=1)[None])[0]
