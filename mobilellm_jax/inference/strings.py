"""Strings drawn from a model of a grammar, and how many of them the grammar has."""

import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tasks.structure import Structure
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.model.stack import Params

_ROWS = 256  # strings drawn side by side


def draw_strings(
    params: Params, config: ModelConfig, task: Structure, count: int, seed: int, temperature: int | float = 1
) -> list[np.ndarray | None]:
    """Draws strings, each from a separator on, up to the next.

    None for one that is longer than every string of the grammar.

    Args:
      temperature: divisor of the logits; 0 takes the most probable token, so that all strings are alike.
    """
    separator, longest = task.symbols, task.drawn.lengths[0][0][1]
    sampling = Sampling(temperature=float(temperature), top_k=0, top_p=1.0)
    generator = Generator(params, config, sampling, context=longest + 2)
    found: list[np.ndarray | None] = []
    for place in range(0, count, _ROWS):
        prompts = [[separator]] * _ROWS  # as many each time, so that one program serves all
        steps = list(generator.start(prompts, longest + 1, separator, seed, place))
        for ids in list(zip(*steps, strict=True))[: count - place]:
            tokens = [token for token in ids if token is not None]
            is_ended = bool(tokens) and tokens[-1] == separator
            found.append(np.array(tokens[:-1], int) if is_ended else None)
    return found


def count_parsed(task: Structure, strings: list[np.ndarray | None]) -> int:
    """How many strings the grammar has."""
    return int(task.drawn.parse([string for string in strings if string is not None]).sum())
