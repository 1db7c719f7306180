"""What a telephone can be asked for: 12 intents with typed slots, sentences for them, values of slots."""

import dataclasses
import functools


def _listed(text: str, separator: str = "|") -> tuple[str, ...]:
    return tuple(text.split(separator))


ONES = _listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
    " ",
)
TENS = _listed("twenty thirty forty fifty sixty seventy eighty ninety", " ")
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
        return ONES[number]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")


@functools.cache
def values(kind: str, is_new: bool) -> tuple[str, ...]:
    """Values of a slot in training; with `is_new`, of an open list those that training never uses."""
    if kind in _CHOICES:
        return _CHOICES[kind]
    known = len(_OPEN[kind]) * 4 // 5
    return _OPEN[kind][known:] if is_new else _OPEN[kind][:known]


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
ASK = {
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
WEATHER = ("sunny", "cloudy", "rainy", "windy", "foggy")
