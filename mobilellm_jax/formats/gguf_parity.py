"""Comparison of a GGUF file, as llama.cpp computes it, with the run that it was made of."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from mobilellm_jax import model
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.formats import llama_cpp
from mobilellm_jax.parameters import declared, nest

# Largest difference of two logits, over the largest logit, between llama.cpp and our own arithmetic on the
# weights of the file. llama.cpp rounds activations to f16 or bf16, or to 8 bits, before products with weights
# of these types or of few bits. In f32 sums have another order: 1.7e-6 for MobileLLM-125M at initialisation,
# 1.1e-5 for a wide model with weights up to 0.5. A tensor in another place, or rows in another order, make
# about 1; an activation rounded to f16, 1e-3.
BOUNDS = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1, "q4_0": 1e-1}
_POSITIONS = 64

# Texts that tokenizers tend to disagree on.
TEXTS = (
    "",
    " ",
    "The list of words, and more words.",
    "  two  spaces   three ",
    "tabs\tand\r\nlines\n\n\n  end",
    "it's we'LL I'd they've 'tis",
    "3.14 and 1,234,567 x2y",
    "é ñ Å ﬁ ½ Ⅷ",
    "中文 日本語 한국어 العربية עברית हिन्दी",
    "🙂👩‍👩‍👧 ☃️",
    "a\u00a0b\u2003c\u200bd\u3000e",
    "<s></s><bos><eos><unk><|endoftext|><0x41>",
    "▁ lower one eighth ▁▁",
    "def f(x):\n    return {'a': [x**2, -1e-3]}  # !?",
    "\x00\x01\x7f",
)


class ParityError(Exception):
    """llama.cpp computes something else from a file than the run does."""


class Parity(NamedTuple):
    """How near llama.cpp is to the run, in one text of random tokens.

    Attributes:
      positions: length of the text.
      difference: from our own logits with the weights of the file, at most, over the largest of these.
      bound: what was allowed.
      agreeing: positions where both find the same token most probable.
      rounding: difference that the type of the weights makes in our own logits, over the largest; 0 for f32.
      texts: texts that both encode to the same ids; 0 without a tokenizer.
    """

    positions: int
    difference: float
    bound: float
    agreeing: int
    rounding: float
    texts: int


def parity(
    path: Path,
    params: model.Params,
    config: Config,
    kind: str,
    rounded: model.Params | None,
    tokenizer: Tokenizer | None,
    add_bos: bool,
) -> Parity:
    """Compares logits and token ids.

    Args:
      path: the file.
      params: of the run, float32.
      config: of the run.
      kind: type of the weights in the file.
      rounded: parameters of the `expanded` model with the weights of the file; None if they are `params`.
      tokenizer: of the run, if it has one.
      add_bos: whether texts begin with BOS.

    Raises:
      ParityError: logits differ by more than the bound, or ids differ.
      UserError: llama.cpp refuses the file.
    """
    m, count = config.model, min(_POSITIONS, config.data.sequence_length)
    ids = np.random.default_rng(0).integers(0, m.vocab_size, count).tolist()
    full_TV = our_logits(params, m, ids)
    ours_TV = full_TV if rounded is None else our_logits(rounded, expanded(m)[0], ids)
    with llama_cpp.Model(path, context=count) as there:
        theirs_TV = there.logits(ids)
        texts = 0 if tokenizer is None else _check_ids(there, tokenizer, add_bos)
    difference = _difference(theirs_TV, ours_TV)
    if not difference <= BOUNDS[kind]:
        raise ParityError(
            f"logits of llama.cpp differ from those of the run by {difference:.1e} of the largest; expected "
            f"at most {BOUNDS[kind]:.0e}"
        )
    agreeing = int(np.sum(theirs_TV.argmax(-1) == ours_TV.argmax(-1)))
    return Parity(count, difference, BOUNDS[kind], agreeing, _difference(ours_TV, full_TV), texts)


def our_logits(params: model.Params, config: ModelConfig, ids: list[int]) -> Float32[np.ndarray, "T V"]:
    """Our own logits after each id, in float32."""
    exact = dataclasses.replace(config, compute_dtype="float32")
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(model.apply, static_argnums=2)
        return np.asarray(apply(params, np.array([ids], np.int32), exact)[0])


def expanded(config: ModelConfig) -> tuple[ModelConfig, model.Params]:
    """The model that a file holds, with a block for each layer and no multipliers, and empty parameters."""
    depth = config.effective_depth
    m = dataclasses.replace(config, depth=depth, sharing="none", num_repeats=1, parameterization="standard")
    return m, nest({of.path: np.empty(of.shape(m), np.float32) for of in declared(m)})


def _difference(actual_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    return float(np.abs(actual_TV - expected_TV).max() / np.abs(expected_TV).max())


def _check_ids(there: llama_cpp.Model, tokenizer: Tokenizer, add_bos: bool) -> int:
    """Compares the ids of `TEXTS`, and of all of them in one; returns their number."""
    texts = [*TEXTS, "\n".join(TEXTS)]
    before = [tokenizer.bos_id] if add_bos else []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        theirs = there.tokenize(text)
        if theirs != before + ids:
            raise ParityError(f"{text!r}: llama.cpp encodes it to {theirs}, the run to {before + ids}")
    return len(texts)
