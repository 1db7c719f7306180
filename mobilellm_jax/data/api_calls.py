"""Conversations with a telephone, generated: wishes in words, and the calls that fulfil them.

A spec such as "api_calls:split=train,conversations=5000,seed=0,tasks=3,intents=12" names them (these are the
defaults; the other splits have 2,500 conversations). A conversation has 1 to `tasks` tasks. In each a person
asks for one of the intents; in half of them a slot is missing and the assistant asks for it; then come the
call, its result and an answer. Calls are JSON, {"intent": ..., and slots in the order of `INTENTS`}, with
typed values: "half past seven" is "07:30", "twenty" is 20.

Splits of tests, none of whose calls is ever in the split "train":

  combinations  values and wordings of training, in calls that are new as a whole
  values        every call has a name, place, song or text that training never uses
  wordings      the first sentence of a task is worded as in no training

What is held out is determined by a hash of the call, not by what was drawn, so that it holds for all sizes
and seeds. Conversation n comes from NumPy's Philox generator at counter n, so that a longer source begins
like a shorter one.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mobilellm_jax.data.chat import Conversation, Turn
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


# --- values ---------------------------------------------------------------------------------------------


def _listed(text: str, separator: str = "|") -> tuple[str, ...]:
    return tuple(text.split(separator))


_ONES = _listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
    " ",
)
_TENS = _listed("twenty thirty forty fifty sixty seventy eighty ninety", " ")
# Of open lists the last fifth is held out, for the split "values".
_OPEN = {
    "name": _listed(
        "Anna Ben Carla David Ella Felix Grace Henry Ida Jonas Karim Lena Marta Noah Olga Paul Rosa Simon "
        "Tara Victor Yusuf Zoe Amir Bella Chen",
        " ",
    ),
    "city": _listed(
        "Oslo Lima Rome Paris Cairo Delhi Berlin Madrid Vienna Dublin Lisbon Prague Athens Boston Denver "
        "Quito Tokyo Sydney Nairobi Geneva",
        " ",
    ),
    "place": _listed(
        "the station|the airport|the museum|the harbour|the library|the market|the stadium|the old bridge|"
        "the town hall|the hospital|the theatre|the zoo|the castle|the lighthouse|the garden"
    ),
    "song": _listed(
        "Blue River|Night Train|Golden Hour|Paper Moon|Silent Street|Summer Rain|Little Star|Open Road|"
        "Red Balloon|Winter Sun|Last Dance|Green Hills|Broken Clock|Morning Light|Wild Geese"
    ),
    "label": _listed(
        "gym|pasta|school run|laundry|tea|medicine|yoga|bread|the bus|football|a nap|homework|the dentist|"
        "choir|the oven"
    ),
    "text": _listed(
        "I am late|see you soon|call me back|the meeting is off|dinner is ready|bring some milk|good luck|"
        "I found the keys|the train is full|happy birthday|we are outside|send me the photos|all is well|"
        "wait for me|the film was great"
    ),
    "table": _listed(
        "Casa Verde|The Blue Door|Little Asia|Mama Rosa|The Mill|Sakura|Old Harbour|Chez Louis|The Anchor|"
        "Green Garden|Taj Palace|The Oak|Luna|Nordwind|Olive Tree"
    ),
    "title": _listed(
        "team lunch|book club|a haircut|the concert|parents evening|a job interview|chess night|the reunion|"
        "car service|a piano lesson|budget talk|movie night|the picnic|a checkup|tax day"
    ),
    "room": _listed(
        "kitchen|bedroom|bathroom|hall|office|garage|cellar|attic|dining room|living room|nursery|guest room|"
        "study|porch|pantry"
    ),
}
_CHOICES = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "mode": ("on foot", "by car", "by bike", "by bus"),
    "line": ("mobile", "home", "work"),
}


def number_words(number: int) -> str:
    """A number below 100 in words: 42 is "forty two"."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f" {_ONES[number % 10]}" if number % 10 else "")


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
        said = f"{past}{_ONES[hour % 12 or 12]} {'in the morning' if hour < 12 else 'in the evening'}"
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


# --- intents --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Intent:
    """What can be asked for.

    Attributes:
      slots: name -> type; the names are those of the call.
      wordings: sentences with all slots, each as {name}; the last is held out for the split "wordings".
      short: sentences that lack the slot `missing`; the last is held out too.
      answer: what the assistant says after the call.
    """

    slots: dict[str, str]
    wordings: tuple[str, ...]
    short: tuple[str, ...]
    missing: str
    answer: str


def _intent(slots: str, wordings: str, short: str, missing: str, answer: str) -> Intent:
    pairs = dict(slot.split(":") for slot in slots.split())
    return Intent(pairs, _listed(wordings), _listed(short), missing, answer)


# Those that copy words come first, then numbers, then times.
INTENTS: dict[str, Intent] = {
    "make_call": _intent(
        "contact:name line:line",
        "call {contact} on the {line} phone|phone {contact} on the {line} line|ring {contact} at the {line} "
        "number|I want to speak with {contact}, use the {line} number",
        "call {contact}|phone {contact}|I want to speak with {contact}",
        "line",
        "Calling {contact}.",
    ),
    "play_song": _intent(
        "song:song room:room",
        "play {song} in the {room}|put on {song} in the {room}|I want to hear {song} in the {room}|let "
        "{song} sound in the {room}",
        "play {song}|put on {song}|I feel like {song}",
        "room",
        "Playing {song} in the {room}.",
    ),
    "get_weather": _intent(
        "city:city day:day",
        "what is the weather in {city} on {day}|weather in {city} for {day}|how will the weather be in "
        "{city}, {day}|do I need an umbrella in {city} on {day}",
        "what is the weather in {city}|how is the weather in {city}|do I need an umbrella in {city}",
        "day",
        "It will be {result} in {city}.",
    ),
    "get_directions": _intent(
        "place:place mode:mode",
        "how do I get to {place} {mode}|show me the way to {place} {mode}|directions to {place} {mode}|I am "
        "lost, bring me to {place} {mode}",
        "how do I get to {place}|show me the way to {place}|where is {place}",
        "mode",
        "Here is the way to {place}.",
    ),
    "set_light": _intent(
        "room:room percent:percent",
        "set the light in the {room} to {percent} percent|dim the {room} to {percent} percent|light in the "
        "{room} at {percent} percent|the {room} should be lit at {percent} percent",
        "set the light in the {room}|dim the {room}|change how bright the {room} is",
        "percent",
        "The light in the {room} is set.",
    ),
    "set_heating": _intent(
        "room:room degrees:degrees",
        "heat the {room} to {degrees} degrees|set the {room} to {degrees} degrees|make it {degrees} degrees "
        "in the {room}|I want {degrees} degrees in the {room}",
        "heat the {room}|change the heating in the {room}|it is cold in the {room}",
        "degrees",
        "The heating in the {room} is set.",
    ),
    "set_timer": _intent(
        "minutes:minutes label:label",
        "set a timer for {label}, {minutes} minutes|start a timer of {minutes} minutes for {label}|count "
        "down {minutes} minutes for {label}|{label} takes {minutes} minutes, tell me when it is over",
        "set a timer for {label}|start a timer for {label}|tell me when {label} is over",
        "minutes",
        "The timer for {label} is running.",
    ),
    "send_message": _intent(
        "contact:name text:text",
        "send {contact} a message: {text}|text {contact} that {text}|write to {contact}: {text}|let "
        "{contact} know: {text}",
        "send {contact} a message|write to {contact}|I have something to tell {contact}",
        "text",
        "Your message to {contact} is sent.",
    ),
    "order_ride": _intent(
        "place:place time:time",
        "get me a ride to {place} at {time}|order a taxi to {place} for {time}|I need a car to {place} at "
        "{time}|bring me to {place}, leave at {time}",
        "get me a ride to {place}|order a taxi to {place}|bring me to {place}",
        "time",
        "Your ride to {place} is ordered.",
    ),
    "set_alarm": _intent(
        "time:time label:label",
        "set an alarm for {time} for {label}|wake me at {time} for {label}|I need an alarm at {time}, it is "
        "for {label}|please ring at {time}, {label} is waiting",
        "set an alarm for {label}|I need an alarm for {label}|do not let me miss {label}",
        "time",
        "The alarm for {label} is set.",
    ),
    "add_event": _intent(
        "title:title day:day time:time",
        "add {title} on {day} at {time}|put {title} in my calendar for {day} at {time}|plan {title} for "
        "{day} at {time}|do not forget {title}, {day} at {time}",
        "add {title} on {day}|put {title} in my calendar for {day}|{day} is {title}, write it down",
        "time",
        "{title} is in your calendar for {day}.",
    ),
    "book_table": _intent(
        "restaurant:table people:people time:time",
        "book a table at {restaurant} for {people} at {time}|reserve {restaurant} for {people} people at "
        "{time}|a table for {people} at {restaurant} at {time} please|we are {people} and want to eat at "
        "{restaurant} at {time}",
        "book a table at {restaurant} at {time}|reserve {restaurant} at {time}|we want to eat at "
        "{restaurant} at {time}",
        "people",
        "Your table at {restaurant} is booked.",
    ),
}
_ASK = {
    "time": ("At what time?", "When?"),
    "minutes": ("How many minutes?", "For how long?"),
    "text": ("What should it say?", "What is the message?"),
    "room": ("In which room?", "Where should it play?"),
    "mode": ("How do you want to travel?", "On foot, by car, by bike or by bus?"),
    "people": ("For how many people?", "How many are you?"),
    "percent": ("How bright?", "To how many percent?"),
    "line": ("Which number, mobile, home or work?", "On which line?"),
    "day": ("For which day?", "On what day?"),
    "degrees": ("How warm?", "To how many degrees?"),
}
_WEATHER = ("sunny", "cloudy", "rainy", "windy", "foggy")


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
        turns += [Turn("assistant", draws.one(_ASK[intent.missing])), Turn("user", said[intent.missing])]
    result = draws.one(_WEATHER) if name == "get_weather" else "ok"
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


@functools.cache
def values(kind: str, is_new: bool) -> tuple[str, ...]:
    """Values of a slot in training; with `is_new`, of an open list those that training never uses."""
    if kind in _CHOICES:
        return _CHOICES[kind]
    known = len(_OPEN[kind]) * 4 // 5
    return _OPEN[kind][known:] if is_new else _OPEN[kind][:known]
