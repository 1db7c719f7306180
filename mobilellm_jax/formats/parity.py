"""Comparison of an exported model, as another library computes it, with the run that it was made of."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from mobilellm_jax import model
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.parameters import declared, nest

_POSITIONS = 64


class ParityError(Exception):
    """Another library computes something else from a file than the run does."""


class Parity(NamedTuple):
    """How near another library is to the run, in one text of random tokens.

    Attributes:
      library: its name.
      positions: length of the text.
      difference: from our own logits with the weights of the file, at most, over the largest of these.
      bound: what was allowed.
      agreeing: positions where both find the same token most probable.
      rounding: difference that the type of the weights makes in our own logits, over the largest; 0 for f32.
      texts: texts that both encode to the same ids; 0 if none were compared.
    """

    library: str
    positions: int
    difference: float
    bound: float
    agreeing: int
    rounding: float
    texts: int = 0


def random_ids(config: Config) -> list[int]:
    """The text that is compared: random tokens, no more than a row of training has."""
    count = min(_POSITIONS, config.data.sequence_length)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, count).tolist()


def compare(
    library: str,
    theirs_TV: Float32[np.ndarray, "T V"],
    ours_TV: Float32[np.ndarray, "T V"],
    full_TV: Float32[np.ndarray, "T V"],
    bound: float,
) -> Parity:
    """Compares logits.

    Args:
      library: name of the other library.
      theirs_TV: what it computes.
      ours_TV: our own, with the weights of the file.
      full_TV: our own, with the weights of the run.
      bound: largest difference allowed, over the largest logit.

    Raises:
      ParityError: logits differ by more than that, or are no numbers.
    """
    found = difference(theirs_TV, ours_TV)
    if not found <= bound:
        raise ParityError(
            f"logits of {library} differ from those of the run by {found:.1e} of the largest; expected at "
            f"most {bound:.0e}"
        )
    agreeing = int(np.sum(theirs_TV.argmax(-1) == ours_TV.argmax(-1)))
    return Parity(library, len(ours_TV), found, bound, agreeing, difference(ours_TV, full_TV))


def our_logits(params: model.Params, config: ModelConfig, ids: list[int]) -> Float32[np.ndarray, "T V"]:
    """Our own logits after each id, in float32."""
    exact = dataclasses.replace(config, compute_dtype="float32")
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(model.apply, static_argnums=2)
        return np.asarray(apply(params, np.array([ids], np.int32), exact)[0])


def expanded(config: ModelConfig, **changes: Any) -> tuple[ModelConfig, model.Params]:
    """The model that a file holds, with a block for each layer and no multipliers, and empty parameters."""
    fields = {"sharing": "none", "num_repeats": 1, "parameterization": "standard"}
    m = dataclasses.replace(config, depth=config.effective_depth, **{**fields, **changes})
    return m, nest({of.path: np.empty(of.shape(m), np.float32) for of in declared(m)})


def difference(actual_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    """The largest difference of two logits, over the largest expected one."""
    return float(np.abs(actual_TV - expected_TV).max() / np.abs(expected_TV).max())
