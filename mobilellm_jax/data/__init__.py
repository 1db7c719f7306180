"""From a source of text to batches of token ids.

`prepare` tokenises a source once and packs it into fixed-length rows on disk, or opens a synthetic task,
whose rows are drawn as they are needed. Both are a `Dataset`: batches for training and evaluation. The
position of a run in its data is one integer, the step.
"""

from mobilellm_jax.data.pipeline import Dataset, padded_batches
from mobilellm_jax.data.prepare import prepare
from mobilellm_jax.data.prepared import PreparedData, open_prepared
from mobilellm_jax.data.tasks import Measures, TaskData
from mobilellm_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer

__all__ = [
    "Dataset",
    "Measures",
    "PreparedData",
    "TaskData",
    "Tokenizer",
    "load_tokenizer",
    "open_prepared",
    "padded_batches",
    "prepare",
    "save_tokenizer",
]
