"""Instructions that a program can check: how often does a reply do what it was told?

In the spirit of IFEval (Zhou et al. 2023, arXiv 2311.07911), with rules and prompts of our own, so that
nothing is downloaded: numbers of words, JSON, case, words that must or must not occur, a phrase at the end. A
reply that keeps a rule can be nonsense, so that figures of style stand beside the shares, see `talk.style`.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.inference.talk import Speaker, answers, style

Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of instruction.

    Attributes:
      says: the instruction, with its arguments in braces.
      choices: arguments, each of which is asked for in turn.
      keeps: whether a reply, without spaces around it, keeps it.
    """

    says: str
    choices: tuple[Arguments, ...]
    keeps: Callable[[str, Arguments], bool]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['-]\w+)*", text)


def _has(text: str, word: str) -> bool:
    return word.lower() in map(str.lower, _words(text))


def _is_json(text: str, arguments: Arguments) -> bool:
    del arguments
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))


_NUMBERS = tuple({"n": n} for n in (5, 10, 20, 40))
_WORDS = tuple({"word": word} for word in ("water", "friend", "morning", "small"))
RULES: dict[str, Rule] = {
    "at_least": Rule("Use at least {n} words.", _NUMBERS, lambda text, a: len(_words(text)) >= a["n"]),
    "at_most": Rule("Use at most {n} words.", _NUMBERS, lambda text, a: 0 < len(_words(text)) <= a["n"]),
    "json": Rule("Answer with a JSON object and nothing else.", ({},), _is_json),
    "lower": Rule(
        "Use lower case letters only.", ({},), lambda text, a: _has_letters(text) and text == text.lower()
    ),
    "upper": Rule(
        "Use capital letters only.", ({},), lambda text, a: _has_letters(text) and text == text.upper()
    ),
    "word": Rule('Use the word "{word}".', _WORDS, lambda text, a: _has(text, a["word"])),
    "no_word": Rule(
        'Do not use the word "{word}".', _WORDS, lambda text, a: bool(text) and not _has(text, a["word"])
    ),
    "end": Rule(
        'End with the sentence "{phrase}"',
        ({"phrase": "That is all."}, {"phrase": "What do you think?"}),
        lambda text, a: text.endswith(a["phrase"]),
    ),
}
_WISHES = (
    "Tell me about {}.",
    "Write a short text about {}.",
    "What do you know about {}?",
    "Describe {} to a child.",
)
_TOPICS = (
    *("the sea", "a cat", "winter", "bread", "trains", "the moon"),
    *("a garden", "music", "rain", "a market", "horses", "school"),
)


def prompts(rule: str, count: int) -> Iterator[tuple[str, Arguments]]:
    """Yields the first `count` prompts of a rule, at most 48 of them different, with their arguments."""
    wishes = (wish.format(topic) for wish in _WISHES for topic in _TOPICS)
    choices = itertools.cycle(RULES[rule].choices)
    for wish, arguments in itertools.islice(zip(itertools.cycle(wishes), choices, strict=False), count):
        yield f"{wish} {RULES[rule].says.format(**arguments)}", arguments


def parse(names: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Rules, and number of prompts of each, of --instructions: "all" or names, the last with :<number>.

    Raises:
      UserError: a rule is unknown, or the number is not valid.
    """
    *first, last = names
    name, colon, number = last.partition(":")
    if colon and not (number.isdecimal() and 1 <= int(number) <= 48):
        raise UserError(f"--instructions: {last!r} is not valid; expected 1 to 48 prompts of a rule")
    found = list(dict.fromkeys([*first, name]))
    rules = [rule for one in found for rule in (RULES if one == "all" else [one])]
    for rule in rules:
        if rule not in RULES:
            raise UserError(
                f"--instructions: there is no rule {rule!r}; {did_you_mean(rule, ['all', *RULES])}"
            )
    return tuple(dict.fromkeys(rules)), int(number) if colon else 24


def follow(speaker: Speaker, rule: str, count: int, batch_size: int) -> dict[str, Any]:
    """How a model follows a rule: "kept" (share), its "standard_error", "prompts", and `talk.style`."""
    asked = list(prompts(rule, count))
    replies = [turns[0] for turns in answers(speaker, [[text] for text, _ in asked], batch_size)]
    kept = [RULES[rule].keeps(reply, arguments) for reply, (_, arguments) in zip(replies, asked, strict=True)]
    share = sum(kept) / len(kept)
    error = (share * (1 - share) / (len(kept) - 1)) ** 0.5 if len(kept) > 1 else None
    return {"kept": share, "standard_error": error, "prompts": len(kept), **style(replies)}


def line(name: str, scores: Mapping[str, Any]) -> str:
    """One line of the table of `follow`."""
    error = scores["standard_error"]
    kept = f"{100 * scores['kept']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    style_of = f"{scores['words']:>6.1f} {scores['empty']:>7.1%} {scores['repeated']:>9.1%}"
    return f"{name:<10} {scores['prompts']:>7} {kept:>12} {style_of}"


HEAD = f"{'rule':<10} {'prompts':>7} {'kept, %':>12} {'words':>6} {'empty':>7} {'repeated':>9}"
