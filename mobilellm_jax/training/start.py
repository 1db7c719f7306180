"""The first state of a run: drawn at random, or that of another run, read straight into its shardings."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.parallel import partition
from mobilellm_jax.storage.checkpoint import place_params, place_state
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training.programs import Programs
from mobilellm_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run starts from.

    Attributes:
      checkpoint: of another run; None once this run has one of its own.
      model: the other run's.
      with_optimizer: take the state of the other run's optimizer as well.
      first_batch: batches of the data that the other run used up.
    """

    checkpoint: AnyPath | None
    model: ModelConfig
    with_optimizer: bool
    first_batch: int


def first_state(programs: Programs, seed: int, origin: Origin | None, mesh: Mesh) -> TrainState:
    """The state before the first step; it counts steps from 0 in any case."""
    state = programs.init(jax.random.key(seed))
    if origin is None or origin.checkpoint is None:
        return state
    if origin.with_optimizer:
        step = state.step
        del state  # else both were in memory
        return place_state(origin.checkpoint, programs.state)._replace(step=step)
    return state._replace(params=_parameters(state.params, origin, origin.checkpoint, mesh))


def _parameters(own: model.Params, origin: Origin, checkpoint: AnyPath, mesh: Mesh) -> model.Params:
    """The origin's parameters, in the shapes of `own`, whose buffers are freed where they are not needed."""
    there = jax.eval_shape(lambda: model.init(jax.random.key(0), origin.model))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(shape: Any, sharding: NamedSharding, mine: jax.Array) -> jax.ShapeDtypeStruct:
        if shape.shape == mine.shape:
            mine.delete()
        else:  # its vocabulary may not be divisible by the mesh
            sharding = whole
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    like = jax.tree.map(place, there, partition.shardings(there, mesh), own)

    def fit(loaded: jax.Array, mine: jax.Array) -> jax.Array:
        return loaded if loaded.shape == mine.shape else _resized(loaded, mine)

    return jax.tree.map(fit, place_params(checkpoint, like), own)


def _resized(loaded_VD: Float[Array, "v D"], mine_VD: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """`mine` with the rows that both have from `loaded`, in the sharding of `mine`."""
    common = min(len(loaded_VD), len(mine_VD))
    put = jax.jit(lambda a, b: b.at[:common].set(a[:common]), out_shardings=mine_VD.sharding)
    return put(loaded_VD, mine_VD)
