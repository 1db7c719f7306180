"""From a source of text to batches of token ids.

`prepare` tokenises a source once and packs it into fixed-length rows on disk; `train_batches` and
`eval_batches` read them back. Rows of synthetic tasks are drawn as they are needed instead. The position of
a run in its data is one integer, the step.
"""

from mobilellm_jax.data.pipeline import eval_batches, train_batches
from mobilellm_jax.data.prepare import prepare
from mobilellm_jax.data.prepared import PreparedData, open_prepared
from mobilellm_jax.data.tasks import TaskData
from mobilellm_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer

__all__ = [
    "PreparedData",
    "TaskData",
    "Tokenizer",
    "eval_batches",
    "load_tokenizer",
    "open_prepared",
    "prepare",
    "save_tokenizer",
    "train_batches",
]
