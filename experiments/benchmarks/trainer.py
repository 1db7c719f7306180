"""What several parts train: MobileLLM-125M or a smaller model, with its compiled step and state."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from configs import base, depth_vs_width, mobilellm
from mobilellm_jax import partition, run
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.train import make_programs


def paper_config(quick: bool, rows: int, length: int) -> Config:
    """Returns MobileLLM-125M in the paper's recipe, in float32 on a CPU.

    Args:
      quick: of one block, 64 wide, for tests.
      rows, length: the size of a batch.
    """
    config = mobilellm.get_config("125m")
    if quick:
        base.update(
            config, {"model.depth": 1, "model.width": 64, "model.num_heads": 4, "model.vocab_size": 512}
        )
        base.update(config, {"model.num_kv_heads": 2, "model.ffn_width": 64})
    if jax.default_backend() == "cpu":  # which has no bfloat16 units
        config.model.compute_dtype = "float32"
    config.data.tokenizer = "bytes"
    sizes = {"train.batch_size": rows, "train.eval_batch_size": rows, "data.sequence_length": length}
    return from_config_dict(base.update(config, sizes))


def tiny_config() -> Config:
    """Returns a point of the study depth_vs_width at its `tiny` preset."""
    config = depth_vs_width.get_config("tiny")
    return from_config_dict(base.update(config, next(iter(depth_vs_width.sweep("tiny")))))


class Trainer:
    """A model in training."""

    def __init__(self, config: Config):
        """Initialises it, and compiles its step, on the mesh that the config asks for."""
        mesh = run.check(config)
        self.config, self.programs = config, make_programs(config, mesh)
        self.share = partition.process_share(mesh)
        self.state = self.programs.init(jax.random.key(0))
        self._learning_rate = jnp.float32(1e-4)
        self.train(self.random_batches(), 1)

    def random_batches(self) -> Iterator[np.ndarray]:
        """Yields the same random rows again and again."""
        rows = np.random.default_rng(0).integers(0, 256, self.programs.rows.shape, dtype=np.int32)
        while True:
            yield rows

    def train(self, batches: Iterator[np.ndarray], steps: int) -> float:
        """Trains as `train.train` does, without log, saves and evaluations, and waits for the last step.

        Returns the seconds that were spent waiting for batches.
        """
        waited, pending = 0.0, None
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            rows = jax.make_array_from_process_local_data(self.programs.rows.sharding, batch)
            self.state, metrics = self.programs.step(self.state, rows, self._learning_rate)
            if pending is not None:
                float(pending)
            pending = metrics["loss"]
        jax.block_until_ready(pending)
        return waited
