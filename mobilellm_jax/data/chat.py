"""Conversations: turns and roles, the one template, and token ids of which only replies are targets.

The template is plain text, so that every tokenizer with an EOS can be used. Turns are joined by a newline:

  <|user|>
  Wake me at seven.
  <|assistant|>
  {"intent":"set_alarm","time":"07:00"}<eos>
  <|result|>
  ok
  <|assistant|>
  Your alarm is set.<eos>

A call is a turn of the assistant that is JSON, so that a model chooses by its first character between a call
and an answer. Targets are the texts of the assistant, calls included, each with its EOS; headers are input
only.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mobilellm_jax.data.rows import is_target, no_target, targets_of
from mobilellm_jax.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant", "call", "result")
MADE = ("assistant", "call")  # the roles of turns that a model makes
ASK = "<|assistant|>\n"  # the header of those turns
# The same for transformers. Contents that are no text are the objects of calls and results.
TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- set text = message['content'] if message['content'] is string else message['content'] | tojson %}"
    "{%- if not loop.first %}{{- '\\n' }}{%- endif %}"
    "{%- if message['role'] in ['assistant', 'call'] %}"
    "{{- '<|assistant|>\\n' + text | trim + eos_token }}"
    "{%- else %}"
    "{{- '<|' + message['role'] + '|>\\n' + text | trim }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\\n<|assistant|>\\n' }}{%- endif %}"
)


class Turn(NamedTuple):
    """What one side says: one of `ROLES`, and its text without spaces around it."""

    role: str
    text: str


Conversation = tuple[Turn, ...]


# --- reading --------------------------------------------------------------------------------------------


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """The conversation of {"messages": [{"role", "content"}]} or {"instruction", "input", "output"}.

    The content of a call or a result may be JSON instead of text.

    Raises:
      ValueError: it is neither, or has a turn out of place; the message says which, counted from 1.
    """
    if "messages" in row:
        messages = row["messages"]
    elif "instruction" in row and "output" in row:
        asked = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(text, str) for text in asked):
            raise ValueError("'instruction' or 'input' is not a string")
        text = "\n\n".join(filter(None, asked))
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": row["output"]}]
    else:
        raise ValueError(
            "expected 'messages', or 'instruction' and 'output'; the row has the fields " + ", ".join(row)
        )
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is not a list with at least one message")
    turns = tuple(_turn(message, number) for number, message in enumerate(messages, start=1))
    check(turns)
    return turns


def check(turns: Conversation) -> None:
    """Raises ValueError for a turn out of place, an empty turn of the assistant, or none of it at all."""
    before = None
    for number, (role, text) in enumerate(turns, start=1):
        if role == "user" and before == "user":
            raise ValueError(f"messages {number - 1} and {number} are both of the user; join them")
        if role == "system" and before is not None:
            raise ValueError(f"message {number} is of the system; only the first can be")
        if role == "result" and before != "call":
            raise ValueError(f"message {number} is a result, but no call stands before it")
        if role in MADE and not text:
            raise ValueError(f"message {number} is an empty turn of the {role}; leave it out")
        before = role
    if not any(turn.role in MADE for turn in turns):
        raise ValueError("no turn of the assistant, so there is nothing to learn; leave it out")


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"message {number} is not an object with the fields role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; valid roles: {', '.join(ROLES)}")
    if role in ("call", "result") and isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has content of type {type(content).__name__}; expected a string")
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(
            f"message {number} contains half of a surrogate pair, which is not valid Unicode text"
        ) from None
    return Turn(role, content.strip())


# --- the template ---------------------------------------------------------------------------------------


def render(turns: Sequence[Turn], bos: str = "", eos: str = "", ask: bool = False) -> str:
    """The text of `TEMPLATE`; with `ask`, the header of the assistant's next turn is added."""
    texts = [ASK + text + eos if role in MADE else f"<|{role}|>\n{text}" for role, text in turns]
    return bos + "\n".join([*texts, ASK] if ask else texts)


def parts(turns: Sequence[Turn], ask: bool = False) -> list[str]:
    """The text of `render` cut around the assistant's texts: prompt, reply, prompt, reply, ..., prompt.

    EOS stands between a reply and the next prompt, which may be empty.
    """
    found = [""]
    for number, (role, text) in enumerate(turns):
        found[-1] += "\n" if number else ""
        if role in MADE:
            found[-1] += ASK
            found += [text, ""]
        else:
            found[-1] += f"<|{role}|>\n{text}"
    found[-1] += ("\n" if turns else "") + ASK if ask else ""
    return found


# --- token ids ------------------------------------------------------------------------------------------


def encode(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Turn]], ask: bool = False, bos: bool = True
) -> list[list[int]]:
    """Ids of conversations: BOS where the tokenizer has one, prompts as `no_target`, replies with EOS.

    Prompts and replies are encoded apart, a reply as it would be after the newline before it. The ids are
    those of the whole text wherever the tokenizer begins a token at these borders, as all that are tested do.

    Args:
      tokenizer: with an EOS.
      conversations: encoded together.
      ask: see `render`.
      bos: whether to begin with BOS.
    """
    cut = [parts(turns, ask) for turns in conversations]
    texts = [f"\n{text}" if i % 2 else text for of in cut for i, text in enumerate(of)]
    newline, *encoded = tokenizer.encode_batch(["\n", *texts])
    encoded_parts, found = iter(encoded), []
    for of in cut:
        row = [no_target(tokenizer.bos_id)] if bos and tokenizer.bos_id is not None else []
        for i, text in enumerate(of):
            ids = next(encoded_parts)
            if i % 2 == 0:
                row += map(no_target, ids)
                continue
            if ids[: len(newline)] == newline:
                ids = ids[len(newline) :]
            else:  # the newline is part of a longer token
                (ids,) = tokenizer.encode_batch([text])
            row += [*ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        found.append(row)
    return found


def prompt_ids(tokenizer: Tokenizer, turns: Sequence[Turn], bos: bool) -> list[int]:
    """Ids of a conversation up to the assistant's next turn, as inputs of generation."""
    (ids,) = encode(tokenizer, [turns], ask=True, bos=bos)
    return [i if i >= 0 else no_target(i) for i in ids]


def fitting(ids: Sequence[int], size: int) -> list[int]:
    """The whole turns up to the last reply that ends within `size` ids; [] where none does."""
    ends = (n for n in range(min(len(ids), size), 0, -1) if ids[n - 1] >= 0 and (n == len(ids) or ids[n] < 0))
    return list(ids[: next(ends, 0)])


# --- scoring rows ---------------------------------------------------------------------------------------


def wrong_calls(
    rows_RS: Int[np.ndarray, "R S"], guesses_RT: Int[np.ndarray, "R T"], tokenizer: Tokenizer
) -> float:
    """Share of the calls in rows of which greedy decoding would get some token wrong; 1 without calls.

    A call is a reply that begins with "{". Guesses at all its tokens are given those before, so that all are
    right exactly when greedy decoding after the true conversation would give the call.
    """
    targets_RT, is_target_RS = targets_of(rows_RS), is_target(rows_RS)
    is_target_RT = is_target_RS[:, 1:]
    is_first_RT = is_target_RT & ~is_target_RS[:, :-1]
    first = targets_RT[is_first_RT]
    opening = [i for i in np.unique(first).tolist() if tokenizer.decode([i]).lstrip().startswith("{")]
    number = np.cumsum(is_first_RT.ravel())[is_target_RT.ravel()] - 1  # the reply of every target
    mistakes = (guesses_RT != targets_RT)[is_target_RT]
    is_wrong = np.bincount(number, mistakes, len(first)) > 0
    is_call = np.isin(first, opening)
    return float(is_wrong[is_call].mean()) if is_call.any() else 1.0
