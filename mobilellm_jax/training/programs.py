"""The compiled programs of a run, with their shardings.

Runs whose configs agree in all `compiled` fields share them, see `compile_key`.
"""

import dataclasses
import functools
import os
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered, Traced
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from mobilellm_jax import model
from mobilellm_jax.config import COMPILED, Config, flatten, to_dict
from mobilellm_jax.parallel import partition
from mobilellm_jax.training.step import Metrics, Sums, TrainState, eval_step, init_state, train_step

_LEVEL = "xla_backend_optimization_level"  # of LLVM


P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


@runtime_checkable
class Program(Protocol[P, R_co]):
    """A function that runs on the devices; its arguments and results are sharded."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


@runtime_checkable
class Jitted(Program[P, R_co], Protocol[P, R_co]):
    """A program that is compiled at its first call; tracing and lowering take shapes instead of arrays."""

    def trace(self, *args: Any) -> Traced: ...
    def lower(self, *args: Any) -> Lowered: ...


@dataclasses.dataclass(frozen=True)
class Programs:
    """`init_state`, `train_step` and `eval_step` of a config, with their shardings pinned.

    Attributes:
      init: key -> state.
      step: (state, rows, learning_rate) -> (state, metrics); the state is donated.
      evaluate: (params, rows) -> what `eval_step` gives, the same on every device.
      state: shapes, dtypes and shardings of the state.
      rows, eval_rows: the same, of a training and an evaluation batch.
    """

    init: Program[[PRNGKeyArray], TrainState]
    step: Program[[TrainState, Array, ArrayLike], tuple[TrainState, Metrics]]
    evaluate: Program[[model.Params, Array], Sums]
    state: TrainState
    rows: jax.ShapeDtypeStruct
    eval_rows: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class JittedPrograms(Programs):
    """Programs that are compiled at their first call."""

    init: Jitted[[PRNGKeyArray], TrainState]
    step: Jitted[[TrainState, Array, ArrayLike], tuple[TrainState, Metrics]]
    evaluate: Jitted[[model.Params, Array], Sums]

    def trace_step(self) -> Traced:
        return self.step.trace(self.state, self.rows, jax.ShapeDtypeStruct((), jnp.float32))


@dataclasses.dataclass(frozen=True)
class CompiledPrograms(Programs):
    """Compiled programs; `compiled_step` is `step` with its memory analysis."""

    compiled_step: Compiled


def make_programs(config: Config, mesh: Mesh | AbstractMesh) -> JittedPrograms:
    """Builds the programs without compiling them; the mesh may be abstract."""
    m, o, t = config.model, config.optimizer, config.train
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), m, o))
    shardings = partition.shardings(shapes, mesh)
    batch, scalar = partition.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def with_sharding(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def rows(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, config.data.sequence_length + 1), jnp.int32, sharding=batch)

    def step(state: TrainState, rows: Array, learning_rate: Array) -> tuple[TrainState, Metrics]:
        with partition.in_use(mesh):
            return train_step(state, rows, learning_rate, m, o, t.accumulation_steps)

    def evaluate(params: model.Params, rows: Array) -> Sums:
        with partition.in_use(mesh):
            return eval_step(params, rows, m, config.data.has_answers)

    return JittedPrograms(
        init=jax.jit(
            lambda key: init_state(key, m, o),
            out_shardings=shardings,
            # LLVM takes 6 s to optimize the random number generation, which runs once.
            compiler_options={_LEVEL: 0} if jax.default_backend() == "cpu" else None,
        ),
        step=jax.jit(
            step,
            in_shardings=(shardings, batch, scalar),
            out_shardings=(shardings, scalar),
            donate_argnums=0,
            compiler_options=_fast_to_compile(),
        ),
        evaluate=jax.jit(
            evaluate,
            in_shardings=(shardings.params, batch),
            out_shardings=scalar,
            compiler_options=_fast_to_compile(),
        ),
        state=jax.tree.map(with_sharding, shapes, shardings),
        rows=rows(t.batch_size),
        eval_rows=rows(t.eval_batch_size),
    )


def _fast_to_compile() -> dict[str, int] | None:
    """Compiler options of a step on a CPU; None elsewhere, and where XLA_FLAGS sets the level.

    Levels 1 to 3 give the same bits at the same speed, but 3, the default, takes a third longer to compile.
    """
    asked = jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "")
    return {_LEVEL: 1} if asked else None


@dataclasses.dataclass(frozen=True)
class CompileKey:
    """Cache key: equal for configs that have the same programs on the same mesh.

    Attributes:
      values: values of all fields that programs depend on.
      config: one of the configs with this key.
    """

    values: tuple[Any, ...]
    config: Config = dataclasses.field(compare=False)


def compile_key(config: Config) -> CompileKey:
    """Key of a run's programs: all `compiled` fields, and whether evaluation counts right answers."""
    values = tuple(value for name, value in flatten(to_dict(config)).items() if name in COMPILED)
    return CompileKey((config.data.has_answers, *values), config)


@functools.lru_cache(maxsize=1)  # a sweep runs the seeds of one point in succession
def compile_programs(key: CompileKey, mesh: Mesh) -> CompiledPrograms:
    """Compiles the programs of a run; equal keys on one mesh share them."""
    programs = make_programs(key.config, mesh)
    step = programs.trace_step().lower().compile()
    return CompiledPrograms(
        init=programs.init.lower(jax.random.key(0)).compile(),
        step=step,
        evaluate=programs.evaluate.lower(programs.state.params, programs.eval_rows).compile(),
        state=programs.state,
        rows=programs.rows,
        eval_rows=programs.eval_rows,
        compiled_step=step,
    )
