"""API calls: what a model says after true conversations, and whether it is right.

Every turn that the assistant makes is decoded greedily after the true turns before it. Of calls are counted

  json     it is a JSON object
  intent   and its name is right
  slots    and the names of its slots are right
  call     and so are all values: the objects are equal, in any order, numbers as numbers

("structure", which the paper reports beside "intent", is not defined there.) Of the other turns ROUGE-1 and
ROUGE-L are computed, as F measures of lower-case words. What is no JSON, or a call with a name twice, is
wrong and never an error.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data import Tokenizer, chat
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import GREEDY, Generator
from mobilellm_jax.inference.talk import shorten

OF_CALLS = ("json", "intent", "slots", "call")
OF_REPLIES = ("rouge1", "rougeL")
Metrics = dict[str, tuple[float, float | None]]


# --- one answer -----------------------------------------------------------------------------------------


def read_call(text: str) -> dict[str, Any] | None:
    """The object that a text is in JSON; None if it is none, or has a name twice, NaN or infinity."""
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except (ValueError, RecursionError):  # ValueError: also a number with thousands of digits
        return None
    return found if isinstance(found, dict) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: order counts in lists only, 7 is 7.0, and true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return not isinstance(a, dict | list) and a == b


def _parts(call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Name and slots of {"intent", slots ...}, or of {"service", "method", "parameters": {slots ...}}."""
    if "method" in call:
        slots = call.get("parameters")
        return [call.get("service"), call["method"]], slots if isinstance(slots, dict) else {}
    return call.get("intent"), {name: value for name, value in call.items() if name != "intent"}


def score_call(said: str, right: dict[str, Any]) -> dict[str, float]:
    """`OF_CALLS` of one call: 1 where it is right, else 0."""
    call = read_call(said)
    is_json = call is not None
    (name, slots), (right_name, right_slots) = _parts(call or {}), _parts(right)
    has_name = is_json and equal(name, right_name)
    has_slots = has_name and slots.keys() == right_slots.keys()
    return dict(zip(OF_CALLS, map(float, (is_json, has_name, has_slots, equal(call, right))), strict=True))


def rouge(said: str, right: str) -> dict[str, float]:
    """`OF_REPLIES` of one reply."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (said, right))
    common = (sum((Counter(a) & Counter(b)).values()), _longest_common(a, b))
    # 2 p r / (p + r) with precision c / |a| and recall c / |b|
    return {name: 2 * c / max(len(a) + len(b), 1) for name, c in zip(OF_REPLIES, common, strict=True)}


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        last = 0  # of the row before, one place to the left
        for place, other in enumerate(b, start=1):
            last, best[place] = best[place], last + 1 if word == other else max(best[place], best[place - 1])
    return best[-1]


def mean_and_error(values: Sequence[float], group: Sequence[int]) -> tuple[float, float | None]:
    """Mean, and its standard error where values of a group depend on each other; None for one group."""
    found, groups = np.unique(np.asarray(group), return_inverse=True)
    mean = float(np.mean(values))
    if len(found) < 2:
        return mean, None
    of_group = np.bincount(groups, np.asarray(values) - mean)
    clusters = len(found)
    return mean, math.sqrt(clusters / (clusters - 1) * float(of_group @ of_group)) / len(values)


# --- many conversations ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CallScores:
    """Scores of a model on conversations.

    Attributes:
      conversations, calls, replies: their numbers.
      shortened: prompts that lost their first turns, as they did not fit the context.
      metrics: value and standard error by name, `OF_CALLS` and `OF_REPLIES`; without those that nothing was
        asked for. A conversation is one draw: its turns depend on each other.
    """

    conversations: int
    calls: int
    replies: int
    shortened: int
    metrics: Metrics


class _Asked(NamedTuple):
    """A turn to make: number of the conversation, ids of the prompt, the true turn and its tokens."""

    conversation: int
    prompt: list[int]
    right: chat.Turn
    length: int


def score(
    params: model.Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    conversations: Sequence[chat.Conversation],
    context: int,
    batch_size: int,
    bos: bool,
) -> CallScores:
    """Asks a model for every turn of the assistant and scores it.

    Args:
      params: of the model.
      config: its shape.
      tokenizer: with an EOS.
      conversations: at least one.
      context: longest prompt with its true answer, in tokens.
      batch_size: prompts at a time.
      bos: whether prompts begin with BOS.

    Raises:
      UserError: a true call is no JSON object.
    """
    asked, room, shortened = _questions(conversations, tokenizer, context, bos)
    found: dict[str, tuple[list[float], list[int]]] = {}
    generator = Generator(params, config, GREEDY, context + room)  # a wrong answer may be longer
    for turn, said in _answers(generator, tokenizer, asked, room, batch_size):
        if turn.right.role == "call":
            right = read_call(turn.right.text)
            if right is None:
                raise UserError(f"the call {turn.right.text!r:.80} of the conversations is no JSON object")
            values = score_call(said, right)
        else:
            values = rouge(said, turn.right.text)
        for name, value in values.items():
            of_name, group = found.setdefault(name, ([], []))
            of_name.append(value)
            group.append(turn.conversation)
    calls = sum(turn.right.role == "call" for turn in asked)
    names = [name for name in (*OF_CALLS, *OF_REPLIES) if name in found]
    return CallScores(
        conversations=len(conversations),
        calls=calls,
        replies=len(asked) - calls,
        shortened=shortened,
        metrics={name: mean_and_error(*found[name]) for name in names},
    )


def _questions(
    conversations: Sequence[chat.Conversation], tokenizer: Tokenizer, context: int, bos: bool
) -> tuple[list[_Asked], int, int]:
    """All turns to make, the tokens that an answer may have, and the number of shortened prompts."""
    asked: list[_Asked] = []
    for number, (turns, ids) in enumerate(
        zip(conversations, chat.encode(tokenizer, conversations, bos=bos), strict=True)
    ):
        made = [turn for turn in turns if turn.role in chat.MADE]
        plain = [i if i >= 0 else ~i for i in ids]
        starts = [n for n in range(1, len(ids)) if ids[n - 1] < 0 <= ids[n]]
        ends = [n for n in range(1, len(ids) + 1) if ids[n - 1] >= 0 and (n == len(ids) or ids[n] < 0)]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        asked += [
            _Asked(number, plain[:start], turn, length)
            for start, turn, length in zip(starts, made, lengths, strict=True)
        ]
    shortened = 0
    for place, turn in enumerate(asked):
        if len(turn.prompt) + turn.length > context:
            turns = conversations[turn.conversation]
            before = turns[: [id(one) for one in turns].index(id(turn.right))]
            size = max(context - turn.length, context // 2, 1)
            asked[place] = turn._replace(prompt=shorten(tokenizer, before, size, bos))
            shortened += 1
    room = max((turn.length for turn in asked), default=1) + 8
    return asked, room, shortened


def _answers(
    generator: Generator, tokenizer: Tokenizer, asked: Sequence[_Asked], room: int, batch_size: int
) -> Iterator[tuple[_Asked, str]]:
    """Greedy answers of at most `room` tokens. Prompts of similar length share a batch."""
    order = sorted(asked, key=lambda turn: len(turn.prompt))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts = [turn.prompt for turn in batch]
        # always as many prompts, so that few programs are compiled
        prompts += [prompts[-1]] * (batch_size - len(prompts))
        said: list[list[int]] = [[] for _ in prompts]
        for step in generator.start(prompts, room, tokenizer.eos_id, seed=0):
            for ids, token in zip(said, step, strict=True):
                if token is not None and token != tokenizer.eos_id:
                    ids.append(token)
        yield from ((turn, tokenizer.decode(ids).strip()) for turn, ids in zip(batch, said, strict=False))
