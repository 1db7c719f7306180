"""A model in training, for several parts: MobileLLM-125M or smaller, with its compiled step and state."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from configs import base, depth_vs_width
from mobilellm_jax import model
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.data.rows import no_target
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.run import check
from mobilellm_jax.training.programs import make_programs
from mobilellm_jax.training.step import Distillation


def tiny_config() -> Config:
    """Config of the first point of the study depth_vs_width at its `tiny` preset."""
    config = depth_vs_width.get_config("tiny")
    return from_config_dict(base.update(config, next(iter(depth_vs_width.sweep("tiny")))))


class Trainer:
    """A model in training, with its programs, mesh and state."""

    def __init__(self, config: Config, distillation: Distillation | None = None):
        """Initialises the model, and compiles its step, on the mesh of the config.

        A teacher has random parameters.
        """
        mesh = check(config)
        self.config, self.programs = config, make_programs(config, mesh, distillation)
        self.share = partition.process_share(mesh)
        self.state = self.programs.init(jax.random.key(0))
        self._learning_rate = jnp.float32(1e-4)
        self._teacher: tuple[model.Params, ...] = ()
        if distillation:
            random = model.init(jax.random.key(1), distillation.model)
            like = self.programs.teacher[0]
            placed = jax.tree.map(
                lambda w, leaf: jax.device_put(leaf.astype(w.dtype), w.sharding), like, random
            )
            self._teacher = (placed,)
        self.train(self.random_batches(), 1)

    def random_batches(self, input_only: float = 0.0) -> Iterator[np.ndarray]:
        """Yields the same random rows forever; the first share `input_only` of each is no target."""
        vocabulary, shape = self.config.model.vocab_size, self.programs.rows.shape
        rows = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
        prompt = rows[:, : int(input_only * shape[1])]
        prompt[:] = no_target(prompt)
        while True:
            yield rows

    def train(self, batches: Iterator[np.ndarray], steps: int) -> float:
        """Trains as `loop.train` does, without log, saves and evaluations, and waits for the last step.

        Returns the seconds that were spent waiting for batches.
        """
        waited, pending = 0.0, None
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            rows = jax.make_array_from_process_local_data(self.programs.rows.sharding, batch)
            self.state, metrics = self.programs.step(self.state, rows, self._learning_rate, *self._teacher)
            if pending is not None:
                float(pending)
            pending = metrics["loss"]
        jax.block_until_ready(pending)
        return waited
