"""Comparison of a GGUF file, as llama.cpp computes it, with the run that it was made of."""

from pathlib import Path

from mobilellm_jax import model
from mobilellm_jax.config import Config
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.formats import llama_cpp
from mobilellm_jax.formats.parity import Parity, ParityError, compare, expanded, our_logits, random_ids

# Largest difference of two logits, over the largest logit, between llama.cpp and our own arithmetic on the
# weights of the file. llama.cpp rounds activations to f16 or bf16, or to 8 bits, before products with weights
# of these types or of few bits. In f32 sums have another order: 1.7e-6 for MobileLLM-125M at initialisation,
# 1.1e-5 for a wide model with weights up to 0.5. A tensor in another place, or rows in another order, make
# about 1; an activation rounded to f16, 1e-3.
BOUNDS = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1, "q4_0": 1e-1}

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
    m, ids = config.model, random_ids(config)
    full_TV = our_logits(params, m, ids)
    ours_TV = full_TV if rounded is None else our_logits(rounded, expanded(m)[0], ids)
    with llama_cpp.Model(path, context=len(ids)) as there:
        theirs_TV = there.logits(ids)
        texts = 0 if tokenizer is None else _check_ids(there, tokenizer, add_bos)
    found = compare("llama.cpp", theirs_TV, ours_TV, full_TV, BOUNDS[kind])
    return found._replace(texts=texts)


def _check_ids(there: llama_cpp.Model, tokenizer: Tokenizer, add_bos: bool) -> int:
    """Compares the ids of `TEXTS`, and of all of them in one; returns their number."""
    texts = [*TEXTS, "\n".join(TEXTS)]
    before = [tokenizer.bos_id] if add_bos else []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        theirs = there.tokenize(text)
        if theirs != before + ids:
            raise ParityError(f"{text!r}: llama.cpp encodes it to {theirs}, the run to {before + ids}")
    return len(texts)
