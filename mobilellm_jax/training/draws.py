"""The number of loops of every training step, where `train.loops` has a range."""

import numpy as np

from mobilellm_jax.config import Config
from mobilellm_jax.sharing import loop_counts

_STREAM = 1 << 32  # second word of the key; the data of tasks have small numbers there


def loops_of_steps(config: Config) -> np.ndarray | None:
    """Number of loops of each step, int [steps], all counts alike; None without `train.loops`.

    Number n of a Philox stream under `train.data_seed`, so it depends on the seed and the step alone: a
    resumed run draws as one that was never stopped, and runs of equal seeds draw alike.
    """
    counts = loop_counts(config.train.loops, config.model.sharing, config.model.num_repeats)
    if not counts:
        return None
    raw = np.random.Philox(key=[config.train.data_seed, _STREAM]).random_raw(config.train.steps)
    return np.array(counts)[raw % np.uint64(len(counts))]
