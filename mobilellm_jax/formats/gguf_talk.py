"""A GGUF file that talks, by llama.cpp: the tokenizer and the generator of an `inference.talk.Speaker`."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.llama_cpp import Model
from mobilellm_jax.inference.generate import check_prompts
from mobilellm_jax.inference.talk import Speaker


class GgufTokenizer:
    """The tokenizer of a file, see `data.Tokenizer`."""

    def __init__(self, model: Model, path: Path) -> None:
        self._model = model
        self.spec, self.file_bytes = f"gguf:{path.name}", b""
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.vocab_size = model.vocab_size
        self.bos_id, self.eos_id = model.marks

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._model.tokenize(text, marks=False) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.vocab_size]).decode(errors="replace")


class GgufGenerator:
    """The most probable tokens after one prompt, see `inference.generate.Generator`."""

    def __init__(self, model: Model) -> None:
        self._model, self.context = model, model.context

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None,
        eos_id: int | None,
        seed: int,
        place: int = 0,
    ) -> Iterator[list[int | None]]:
        """Yields the tokens of one prompt; nothing is drawn, so that `seed` and `place` have no effect."""
        del seed, place
        (prompt,) = prompts
        check_prompts(prompts, max_new_tokens, self._model.vocab_size, self.context)
        steps = self.context - len(prompt) if max_new_tokens is None else max_new_tokens
        token = self._model.start(prompt)
        for step in range(1, steps + 1):
            yield [token]
            if token == eos_id or step == steps:
                return
            token = self._model.step(token)


def open_speaker(path: Path, context: int | None, max_new_tokens: int | None) -> tuple[Speaker, str]:
    """A file that replies, and its chat template; "" where it has none.

    Args:
      path: of the file.
      context: longest conversation, in tokens; None: as the file says.
      max_new_tokens: of a reply, see `Speaker`.

    Raises:
      UserError: there is no such file, llama.cpp is not installed or cannot load it, or its tokenizer has no
        EOS.
    """
    if not path.is_file():
        raise UserError(f"--gguf={path}: there is no such file")
    model = Model(path, context)
    tokenizer = GgufTokenizer(model, path)
    if tokenizer.eos_id is None:
        raise UserError(f"--gguf={path}: it has no tokenizer with an EOS, with which replies end")
    return Speaker(GgufGenerator(model), tokenizer, model.adds_bos, max_new_tokens), model.template
