"""Conversations with a model: one turn at a time, or the questions of a file.

Prompts are in the template of `data/chat.py`. A conversation that outgrows the context loses its first turns.
"""

from collections import Counter
from collections.abc import Generator as Generated
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from mobilellm_jax.data import Tokenizer, chat
from mobilellm_jax.data.chat import Turn
from mobilellm_jax.inference.generate import TextStream


@runtime_checkable  # the tests check every annotation
class Generates(Protocol):
    """What `inference.generate.Generator` does, and llama.cpp too."""

    context: int

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None,
        eos_id: int | None,
        seed: int,
        place: int = 0,
    ) -> Iterator[list[int | None]]: ...


class Speaker(NamedTuple):
    """A model that replies.

    Attributes:
      generator: the model, how it draws, and its context.
      tokenizer: with an EOS.
      bos: whether prompts begin with BOS.
      max_new_tokens: longest reply; None takes what the context has left, at least a quarter of it.
      seed: of the draws.
    """

    generator: Generates
    tokenizer: Tokenizer
    bos: bool
    max_new_tokens: int | None = None
    seed: int = 0

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of the prompt for the next reply, with as many of the last turns as there is room for."""
        context = self.generator.context
        room = max(context // 4, 1) if self.max_new_tokens is None else min(self.max_new_tokens, context - 1)
        return shorten(self.tokenizer, turns, context - room, self.bos)

    def steps(self, prompts: Sequence[Sequence[int]], place: int = 0) -> Iterator[list[int | None]]:
        """`Generator.start`; replies that end by EOS have it as their last token."""
        return self.generator.start(prompts, self.max_new_tokens, self.tokenizer.eos_id, self.seed, place)


def shorten(tokenizer: Tokenizer, turns: Sequence[Turn], size: int, bos: bool) -> list[int]:
    """Ids of the prompt without as many of its first turns as are needed for `size` ids.

    Where the last turn alone is longer, its end.
    """
    prompt: list[int] = []
    for start in range(max(len(turns), 1)):
        prompt = chat.prompt_ids(tokenizer, turns[start:], bos)
        if len(prompt) <= size:
            return prompt
    return prompt[-size:]


class Talk:
    """One conversation.

    Attributes:
      turns: what was said, the last reply included as soon as it ends.
    """

    def __init__(self, speaker: Speaker, system: str = "") -> None:
        self._speaker, self._system = speaker, system
        self.turns: list[Turn] = []
        self._place = 0  # of the next reply: each draws anew
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but that of the system."""
        self.turns = [Turn("system", self._system)] if self._system else []

    def say(self, role: str, text: str) -> Generated[str, None, None]:
        """Adds a turn of the user, or a result, and yields the reply as it is made.

        Where the iterator is closed early, the reply is what was made so far.
        """
        self.turns.append(Turn(role, text.strip()))
        tokenizer = self._speaker.tokenizer
        stream, said = TextStream(tokenizer), ""
        place, self._place = self._place, self._place + 1
        try:
            for (token,) in self._speaker.steps([self._speaker.prompt(self.turns)], place):
                if token is not None and token != tokenizer.eos_id and (piece := stream.add(token)):
                    said += piece
                    yield piece
            if piece := stream.finish():
                said += piece
                yield piece
        finally:
            said = said.strip()
            self.turns.append(Turn("call" if said.startswith("{") else "assistant", said))


def answers(speaker: Speaker, questions: Sequence[Sequence[str]], batch_size: int) -> list[list[str]]:
    """Replies to the user's turns of many conversations, one after the other, `batch_size` at a time."""
    talks: list[list[Turn]] = [[] for _ in questions]
    found: list[list[str]] = [[] for _ in questions]
    eos_id = speaker.tokenizer.eos_id
    for number in range(max(map(len, questions), default=0)):
        asked = [place for place, turns in enumerate(questions) if len(turns) > number]
        for place in asked:
            talks[place].append(Turn("user", questions[place][number].strip()))
        for start in range(0, len(asked), batch_size):
            places = asked[start : start + batch_size]
            said: list[list[int]] = [[] for _ in places]
            for step in speaker.steps([speaker.prompt(talks[place]) for place in places], start):
                for ids, token in zip(said, step, strict=True):
                    if token is not None and token != eos_id:
                        ids.append(token)
            for place, ids in zip(places, said, strict=True):
                text = speaker.tokenizer.decode(ids).strip()
                talks[place].append(Turn("assistant", text))
                found[place].append(text)
    return found


def style(texts: Sequence[str]) -> dict[str, float]:
    """What should stand beside every judgement of replies.

    "words": mean number of words. "empty": share of replies without one. "repeated": share of the sequences
    of three words that stood in the same reply before.
    """
    words = [text.split() for text in texts]
    triples = [Counter(zip(of, of[1:], of[2:], strict=False)) for of in words]
    total = sum(counts.total() for counts in triples)
    return {
        "words": sum(map(len, words)) / max(len(words), 1),
        "empty": sum(not of for of in words) / max(len(words), 1),
        "repeated": sum(counts.total() - len(counts) for counts in triples) / max(total, 1),
    }
