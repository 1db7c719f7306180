"""Which schemes to quantize runs to; `runner/quantizing.py` does so."""

import dataclasses
from collections.abc import Sequence

from experiments.runner.questions import Questions
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.quantization.schemes import Scheme, parse


@dataclasses.dataclass(frozen=True)
class Quantizing:
    """What to do to every run.

    Attributes:
      schemes: to quantize to, each from full precision.
      short_groups: allow a last group that is shorter than the others.
      questions: zero-shot tasks that every quantized model is asked; None asks none.
    """

    schemes: tuple[Scheme, ...]
    short_groups: bool = False
    questions: Questions | None = None

    def check(self, config: Config) -> None:
        """Checks that the schemes fit a model; UserError if they do not."""
        from mobilellm_jax.quantization.apply import check_groups  # here: it imports jax

        for scheme in self.schemes:
            check_groups(config.model, scheme, self.short_groups)


def schemes_of(flag: str, names: Sequence[str]) -> tuple[Scheme, ...]:
    """The schemes that a flag names.

    Raises:
      UserError: there is no such scheme.
    """
    try:
        return tuple(dict.fromkeys(map(parse, names)))
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from None
