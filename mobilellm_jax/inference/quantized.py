"""What quantization costs: loss and greedy next tokens of a model on given rows."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.rows import inputs_and_targets, is_target
from mobilellm_jax.model.ops.cross_entropy import token_cross_entropy
from mobilellm_jax.model.stack import head_matrix
from mobilellm_jax.parallel import partition


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says of all targets of some rows.

    Attributes:
      loss: nats per target.
      best: the most probable token at every target, int32, in the order of the rows.
    """

    loss: float
    best: np.ndarray

    def agreement(self, other: "Answers") -> float:
        """Share of the targets for which both take the same token greedily."""
        return float(np.mean(self.best == other.best))


def answers(params: model.Params, config: ModelConfig, mesh: Mesh, batches: Iterable[np.ndarray]) -> Answers:
    """Scores rows, each batch being this process's part of an array [B, T + 1], as `held_out` does."""
    params = jax.device_put(params, partition.shardings(params, mesh))
    place = functools.partial(jax.make_array_from_process_local_data, partition.batch_sharding(mesh))
    program = _program(config, mesh)
    nats, best = [], []
    for batch in batches:
        nats_BT, best_BT, is_target_BT = jax.device_get(program(params, place(batch)))
        nats.append(nats_BT[is_target_BT].astype(np.float64))
        best.append(best_BT[is_target_BT])
    return Answers(float(np.mean(np.concatenate(nats))), np.concatenate(best))


def step(
    params: model.Params, rows_BS: Int[Array, "B S"], config: ModelConfig
) -> tuple[Float[Array, "B T"], Int[Array, "B T"], Any]:
    """Nats and greedy token at every position, and whether there is a target; memory as in `loss`."""
    tokens_BT, targets_BT = inputs_and_targets(rows_BS)
    x_BTD = model.hidden(params, tokens_BT, config)
    nats_BT = token_cross_entropy(x_BTD, head_matrix(params), targets_BT, config.loss_chunk)

    def best(x_BD: Float[Array, "B D"]) -> Int[Array, "B"]:
        return jnp.argmax(model.logits(params, x_BD[:, None, :])[:, 0], axis=-1).astype(jnp.int32)

    best_TB = lax.map(best, x_BTD.swapaxes(0, 1), batch_size=config.loss_chunk)
    return nats_BT, best_TB.swapaxes(0, 1), is_target(targets_BT)


@functools.lru_cache(maxsize=2)  # that of full precision, and that with rounded activations
def _program(config: ModelConfig, mesh: Mesh) -> Any:
    def run(params: model.Params, rows_BS: Array) -> Any:
        with partition.in_use(mesh):
            return step(params, rows_BS, config)

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
