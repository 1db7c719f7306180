"""The first state of a run: drawn at random, or that of another run, read straight into its shardings."""

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mobilellm_jax import model
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.model.adapters import adapted, by_path, join, merged, split
from mobilellm_jax.model.growth import grown
from mobilellm_jax.parallel import partition
from mobilellm_jax.parameters import nest
from mobilellm_jax.storage.checkpoint import place_params, place_state
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training.programs import Programs, with_shardings
from mobilellm_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run starts from.

    Attributes:
      checkpoint: of another run; None once this run has one of its own.
      model: the other run's, with its adapters.
      with_optimizer: take the state of the other run's optimizer as well.
      first_batch: batches of the data that the other run used up.
      grow: `train.grow`.
    """

    checkpoint: AnyPath | None
    model: ModelConfig
    with_optimizer: bool
    first_batch: int
    grow: str = ""


def first_state(programs: Programs, config: Config, origin: Origin | None, mesh: Mesh) -> TrainState:
    """The state before the first step; it counts steps from 0 in any case."""
    state = programs.init(jax.random.key(config.train.init_seed))
    if origin is None or origin.checkpoint is None:
        return state
    if origin.with_optimizer:
        step = state.step
        del state  # else both were in memory
        return place_state(origin.checkpoint, programs.state)._replace(step=step)
    trained, frozen = split(state.params, adapted(config))
    adapters, own = (trained, frozen) if frozen else ({}, trained)
    if origin.grow:
        params = _grown(own, origin.checkpoint, origin, config.model, mesh)
    else:
        params = _parameters(own, origin.checkpoint, origin.model, mesh)
    return state._replace(params=join(adapters, params) if adapters else params)


def _parameters(own: model.Params, checkpoint: AnyPath, there: ModelConfig, mesh: Mesh) -> model.Params:
    """The parameters of a checkpoint in the shapes of `own`, whose buffers are freed where not needed.

    Adapters in the checkpoint are merged.
    """
    mine, whole = by_path(own), NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), there))
    placed = by_path(partition.shardings(shapes, mesh))
    like, resized = {}, set()
    for path, shape in by_path(shapes).items():
        if path in mine and shape.shape != mine[path].shape:
            resized.add(path)
            placed[path] = whole  # the other vocabulary may not be divisible by the mesh
        like[path] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed[path])
    for path in mine.keys() - resized:
        mine[path].delete()
    named = by_path(read_merged(checkpoint, nest(like), there))
    return nest({path: _resized(x, mine[path]) if path in resized else x for path, x in named.items()})


def _grown(
    own: model.Params, checkpoint: AnyPath, origin: Origin, m: ModelConfig, mesh: Mesh
) -> model.Params:
    """Parameters of a deeper or looped model from those of a checkpoint, in the shardings of `own`."""
    there = origin.model
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), there))
    loaded = read_merged(checkpoint, with_shardings(shapes, partition.shardings(shapes, mesh)), there)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, own)
    put = jax.jit(lambda loaded, own: grown(loaded, own, there, m, origin.grow), out_shardings=shardings)
    return put(loaded, own)


def read_merged(checkpoint: AnyPath, like: model.Params, there: ModelConfig) -> model.Params:
    """Reads the parameters of a checkpoint into the shardings of `like`, and merges their adapters.

    Args:
      checkpoint: of a run.
      like: shapes and shardings of its parameters.
      there: its model, with its adapters.
    """
    loaded = place_params(checkpoint, like)
    if there.adapters is None:
        return loaded
    _, matrices = split(like, there)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, matrices)
    return jax.jit(lambda params: merged(params, there), out_shardings=shardings)(loaded)


def _resized(loaded_VD: Float[Array, "v D"], mine_VD: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """`mine` with the rows that both have from `loaded`, in the sharding of `mine`."""
    common = min(len(loaded_VD), len(mine_VD))
    put = jax.jit(lambda a, b: b.at[:common].set(a[:common]), out_shardings=mine_VD.sharding)
    return put(loaded_VD, mine_VD)
