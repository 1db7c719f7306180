"""Conversations with a telephone, generated: wishes in words, and the calls that fulfil them.

A spec such as "api_calls:split=train,conversations=5000,seed=0,tasks=3,intents=12" names them (these are the
defaults; the other splits have 2,500 conversations). A conversation has 1 to `tasks` tasks. In each a person
asks for one of the intents; in half of them a slot is missing and the assistant asks for it; then come the
call, its result and an answer. Calls are JSON, {"intent": ..., and slots in the order of `phone.INTENTS`},
with typed values: "half past seven" is "07:30", "twenty" is 20.

Splits of tests, none of whose calls is ever in the split "train":

  combinations  values and wordings of training, in calls that are new as a whole
  values        every call has a name, place, song or text that training never uses
  wordings      the first sentence of a task is worded as in no training

What is held out is determined by a hash of the call, not by what was drawn, so that it holds for all sizes
and seeds. Conversation n comes from NumPy's Philox generator at counter n, so that a longer source begins
like a shorter one.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mobilellm_jax.data.chat import Conversation, Turn
from mobilellm_jax.data.phone import ASK, INTENTS, ONES, WEATHER, Intent, number_words, values
from mobilellm_jax.data.sources import OnRead, Source
from mobilellm_jax.data.tasks.task import Stream
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.validation import check

VERSION = 1  # raise it when the same spec would give other conversations
SPLITS = ("train", "combinations", "values", "wordings")
TESTS = SPLITS[1:]
_SIZE = {"train": 5000}  # conversations; of tests 2,500
_HELD_OUT = 8  # one call in so many is never in training
_DRAWS = 256  # random numbers that are drawn at a time
Slots = dict[str, str | int]


class _Draws:
    """Draws of one conversation, in order."""

    def __init__(self, stream: Stream, number: int) -> None:
        parts = (stream.numbers(_DRAWS, number, part).tolist() for part in itertools.count())
        self._numbers = itertools.chain.from_iterable(parts)

    def below(self, n: int) -> int:
        return next(self._numbers) % n

    def one(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]


def _time(draws: _Draws) -> tuple[str, str]:
    """A time as "HH:MM" and as one says it, in three spellings."""
    hour, minute = draws.below(24), 5 * draws.below(12)
    said = f"{hour}:{minute:02}"
    spelling = draws.below(3)
    if spelling == 1:
        said = f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
    elif spelling == 2 and minute in (0, 15, 30):
        past = {0: "", 15: "quarter past ", 30: "half past "}[minute]
        said = f"{past}{ONES[hour % 12 or 12]} {'in the morning' if hour < 12 else 'in the evening'}"
    return f"{hour:02}:{minute:02}", said


def _number(draws: _Draws, low: int, high: int, step: int = 1) -> tuple[int, str]:
    number = low + step * draws.below((high - low) // step + 1)
    return number, number_words(number) if draws.below(2) else str(number)


_NUMBERS: dict[str, Callable[[_Draws], tuple[int, str]]] = {
    "minutes": lambda draws: _number(draws, 1, 60),
    "people": lambda draws: _number(draws, 2, 12),
    "percent": lambda draws: _number(draws, 5, 95, 5),
    "degrees": lambda draws: _number(draws, 15, 28),
}


# --- conversations --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a source "api_calls:..." says, see the module.

    Attributes:
      split: one of `SPLITS`.
      conversations: how many; 0 means as many as in the paper's data, 5,000 and 2,500.
      seed: of the draws.
      tasks: most tasks in a conversation.
      intents: how many of `INTENTS`, the first ones.
    """

    split: str = "train"
    conversations: int = 0
    seed: int = 0
    tasks: int = 3
    intents: int = len(INTENTS)

    def __post_init__(self) -> None:
        check(self.split in SPLITS, "split", self.split, ", ".join(SPLITS))
        check(1 <= self.tasks <= 8, "tasks", self.tasks, "1 to 8")
        check(1 <= self.intents <= len(INTENTS), "intents", self.intents, f"1 to {len(INTENTS)}")

    @property
    def count(self) -> int:
        return self.conversations or _SIZE.get(self.split, 2500)


def parse(spec: str, field: str) -> Spec:
    """Reads "api_calls:..."; errors begin with `field`.

    Raises:
      UserError: a name or a value is not valid.
    """
    names = [f.name for f in dataclasses.fields(Spec)]
    values: dict[str, Any] = {}
    for item in filter(None, spec.partition(":")[2].split(",")):
        match = re.fullmatch(r"\s*(\w+)=(\w+)\s*", item)
        if match is None or match[1] not in names or match[1] in values:
            hint = did_you_mean(match[1], names) if match else "expected <name>=<value>, separated by commas"
            raise UserError(f"{field}: {spec!r}: {item!r} is not valid; {hint}")
        is_number = re.fullmatch(r"\d{1,9}", match[2])
        if match[1] != "split" and not is_number:
            raise UserError(f"{field}: {spec!r}: {item!r} is not valid; expected an integer")
        values[match[1]] = match[2] if match[1] == "split" else int(match[2])
    try:
        return Spec(**values)
    except UserError as error:
        raise UserError(f"{field}: {spec!r}: {error}") from None


def open_api_calls(spec: str, field: str) -> Source:
    """Opens "api_calls:..." as a source of conversations; errors as in `parse`."""
    asked = parse(spec, field)
    identity = json.dumps(
        [VERSION, dataclasses.asdict(dataclasses.replace(asked, conversations=asked.count))]
    )

    def read(on_read: OnRead) -> Iterator[Conversation]:
        for conversation in generate(asked):
            on_read(1)
            yield conversation

    return Source(
        name=spec, sha256=hashlib.sha256(identity.encode()).hexdigest(), size=asked.count, read=read
    )


def generate(spec: Spec) -> Iterator[Conversation]:
    """Yields the conversations of a spec."""
    stream = Stream(spec.seed, SPLITS.index(spec.split))
    for number in range(spec.count):
        draws = _Draws(stream, number)
        turns: list[Turn] = []
        for _ in range(1 + draws.below(spec.tasks)):
            turns += _task(draws, spec)
        yield tuple(turns)


def call_text(intent: str, slots: Slots) -> str:
    """The call as JSON in one line."""
    return json.dumps({"intent": intent, **slots}, separators=(",", ":"))


def is_held_out(call: str) -> bool:
    """Whether a call is kept out of training, by its own hash."""
    return int.from_bytes(hashlib.sha256(call.encode()).digest()[:8]) % _HELD_OUT == 0


def _task(draws: _Draws, spec: Spec) -> list[Turn]:
    """The turns of one task: a wish, perhaps a question and its answer, the call, its result, an answer."""
    name, intent = draws.one([*INTENTS.items()][: spec.intents])
    slots, said = _slots(draws, name, intent, spec.split)
    is_missing = draws.below(2) == 1
    wordings = intent.short if is_missing else intent.wordings
    wish = wordings[-1] if spec.split == "wordings" else draws.one(wordings[:-1])
    turns = [Turn("user", wish.format(**said))]
    if is_missing:
        turns += [Turn("assistant", draws.one(ASK[intent.missing])), Turn("user", said[intent.missing])]
    result = draws.one(WEATHER) if name == "get_weather" else "ok"
    answer = intent.answer.format(**{**said, "result": result})
    call = Turn("call", call_text(name, slots))
    return [*turns, call, Turn("result", result), Turn("assistant", answer[0].upper() + answer[1:])]


def _slots(draws: _Draws, name: str, intent: Intent, split: str) -> tuple[Slots, dict[str, str]]:
    """Values for a call that belongs to the split, and how one says them."""
    while True:
        slots: Slots = {}
        said: dict[str, str] = {}
        for slot, kind in intent.slots.items():
            slots[slot], said[slot] = _value(draws, kind, split == "values")
        if split == "values" or is_held_out(call_text(name, slots)) == (split != "train"):
            return slots, said


def _value(draws: _Draws, kind: str, is_new: bool) -> tuple[str | int, str]:
    if kind == "time":
        return _time(draws)
    if kind in _NUMBERS:
        return _NUMBERS[kind](draws)
    value = draws.one(values(kind, is_new))
    return value, value
