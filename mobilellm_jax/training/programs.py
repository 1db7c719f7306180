"""The compiled programs of a run, or of several trials together, with their shardings.

Runs whose configs agree in all `compiled` fields share them, see `compile_key`, and can train together in
one: learning rate, seeds and rows are its arguments.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered, Traced
from jaxtyping import Array, PRNGKeyArray

from mobilellm_jax import model
from mobilellm_jax.config import COMPILED, Config, ModelConfig, flatten, to_dict
from mobilellm_jax.loops import with_repeats
from mobilellm_jax.model.stack import cast
from mobilellm_jax.parallel import partition
from mobilellm_jax.quantization.aware import trained_model
from mobilellm_jax.sharing import loop_counts
from mobilellm_jax.training.step import (
    Distillation,
    Metrics,
    Sums,
    TrainState,
    eval_step,
    init_state,
    train_step,
)

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

    With several trials, `step`, `steps` and `evaluate` take and give everything but a teacher with a leading
    axis [trials], see `trials.py`; `state`, `rows` and `eval_rows` are those of one.

    Attributes:
      trials: number of runs in one program.
      init: key -> state, of one run.
      step: (state, rows, learning_rate, *teacher) -> (state, metrics); the state is donated. Where numbers
        of loops are drawn, that of the most loops.
      steps: the same by number of loops; {} where none is drawn. A program for each: a step then costs what
        its loops cost and computes what a run with as many repeats does. One program, with empty layers to
        fill up the longest plan, would compile once, but wait for the condition of every layer on a GPU.
      evaluate: (params, rows) -> what `eval_step` gives, the same on every device.
      put, pick: (states, state, place) -> states, which are donated, with that of one run at its place; and
        (states, place) -> that of one run. Of a run alone they are not used.
      state: shapes, dtypes and shardings of the state.
      rows, eval_rows: the same, of a training and an evaluation batch.
      teacher: the same, of a teacher's parameters, in a tuple that is empty without a teacher.
    """

    trials: int
    init: Program[[PRNGKeyArray], TrainState]
    step: Program[..., tuple[TrainState, Metrics]]
    steps: Mapping[int, Program[..., tuple[TrainState, Metrics]]]
    evaluate: Program[[model.Params, Array], Sums]
    put: Program[[TrainState, TrainState, int], TrainState]
    pick: Program[[TrainState, int], TrainState]
    state: TrainState
    rows: jax.ShapeDtypeStruct
    eval_rows: jax.ShapeDtypeStruct
    teacher: tuple[model.Params, ...]

    def of_trials(self, tree: Any) -> Any:
        """Shapes and shardings of all trials from those of one."""
        return jax.tree.map(lambda leaf: _stacked_shape(leaf, self.trials), tree) if self.trials > 1 else tree


@dataclasses.dataclass(frozen=True)
class JittedPrograms(Programs):
    """Programs that are compiled at their first call."""

    init: Jitted[[PRNGKeyArray], TrainState]
    step: Jitted[..., tuple[TrainState, Metrics]]
    steps: Mapping[int, Jitted[..., tuple[TrainState, Metrics]]]
    evaluate: Jitted[[model.Params, Array], Sums]

    def trace_step(self) -> Traced:
        return self.trace(self.step)

    def trace(self, step: Jitted[..., Any]) -> Traced:
        rate = jax.ShapeDtypeStruct((self.trials,) if self.trials > 1 else (), jnp.float32)
        return step.trace(self.of_trials(self.state), self.of_trials(self.rows), rate, *self.teacher)


@dataclasses.dataclass(frozen=True)
class CompiledPrograms(Programs):
    """Compiled programs; `compiled_step` is `step` with its memory analysis."""

    compiled_step: Compiled


def make_programs(
    config: Config, mesh: Mesh | AbstractMesh, distillation: Distillation | None = None, trials: int = 1
) -> JittedPrograms:
    """Builds the programs without compiling them; the mesh may be abstract."""
    m, o, t = trained_model(config), config.optimizer, config.train
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), m, o))
    shardings = partition.shardings(shapes, mesh)
    batch, scalar = partition.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    states, batches = jax.tree.map(stacked, (shardings, batch)) if trials > 1 else (shardings, batch)
    teacher = _teacher_shapes(distillation, mesh)

    def rows(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, config.data.sequence_length + 1), jnp.int32, sharding=batch)

    def step_of(m: ModelConfig) -> Any:
        def step(
            state: TrainState, rows: Array, learning_rate: Array, *teacher: model.Params
        ) -> tuple[TrainState, Metrics]:
            with partition.in_use(mesh):
                parts, d = t.accumulation_steps, distillation
                return train_step(state, rows, learning_rate, m, o, parts, *teacher, distillation=d)

        return jax.jit(
            _over_trials(step, trials, shared=len(teacher)),
            in_shardings=(states, batches, scalar, *jax.tree.map(lambda leaf: leaf.sharding, teacher)),
            out_shardings=(states, scalar),
            donate_argnums=0,
            compiler_options=_fast_to_compile(),
        )

    def evaluate(params: model.Params, rows: Array) -> Sums:
        with partition.in_use(mesh):
            return eval_step(params, rows, m, config.data.has_answers)

    counts = loop_counts(t.loops, m.sharing, m.num_repeats)
    steps = {count: step_of(with_repeats(m, count)) for count in counts}
    return JittedPrograms(
        trials=trials,
        init=jax.jit(
            lambda key: init_state(key, m, o),
            out_shardings=shardings,
            # LLVM takes 6 s to optimize the random number generation, which runs once.
            compiler_options={_LEVEL: 0} if jax.default_backend() == "cpu" else None,
        ),
        step=steps[counts[-1]] if counts else step_of(m),
        steps=steps,
        evaluate=jax.jit(
            _over_trials(evaluate, trials),
            in_shardings=(states.params, batches),
            out_shardings=scalar,
            compiler_options=_fast_to_compile(),
        ),
        put=jax.jit(_put, donate_argnums=0, out_shardings=states),
        pick=jax.jit(_pick, out_shardings=shardings),
        state=with_shardings(shapes, shardings),
        rows=rows(t.batch_size),
        eval_rows=rows(t.eval_batch_size),
        teacher=teacher,
    )


def _put(states: TrainState, state: TrainState, place: Array) -> TrainState:
    return jax.tree.map(lambda all_, one: all_.at[place].set(one), states, state)


def _pick(states: TrainState, place: Array) -> TrainState:
    return jax.tree.map(lambda all_: all_[place], states)


def _over_trials(function: Any, trials: int, shared: int = 0) -> Any:
    """`function` of all trials; its last `shared` arguments are the same for all."""
    if trials == 1:
        return function
    return lambda *args: jax.vmap(function, (0,) * (len(args) - shared) + (None,) * shared)(*args)


def stacked(sharding: NamedSharding) -> NamedSharding:
    """The sharding of arrays with a leading axis of trials, which every device has whole."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _stacked_shape(leaf: jax.ShapeDtypeStruct, trials: int) -> jax.ShapeDtypeStruct:
    assert isinstance(leaf.sharding, NamedSharding)
    return jax.ShapeDtypeStruct((trials, *leaf.shape), leaf.dtype, sharding=stacked(leaf.sharding))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` with shardings."""

    def with_sharding(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, shapes, shardings)


def _teacher_shapes(distillation: Distillation | None, mesh: Mesh | AbstractMesh) -> tuple[model.Params, ...]:
    """Parameters of a teacher, cast to its compute dtype once instead of in every step."""
    if distillation is None:
        return ()
    m = distillation.model
    shapes = jax.eval_shape(lambda: cast(model.init(jax.random.key(0), m), m))
    return (with_shardings(shapes, partition.shardings(shapes, mesh)),)


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
      distillation: the part of a teacher in the loss.
      trials: number of runs in one program.
      config: one of the configs with this key.
    """

    values: tuple[Any, ...]
    distillation: Distillation | None
    trials: int
    config: Config = dataclasses.field(compare=False)


def compile_key(config: Config, distillation: Distillation | None = None, trials: int = 1) -> CompileKey:
    """Key of a run's programs: all `compiled` fields, and whether evaluation counts right answers."""
    values = tuple(value for name, value in flatten(to_dict(config)).items() if name in COMPILED)
    return CompileKey((config.data.has_answers, *values), distillation, trials, config)


@functools.lru_cache(maxsize=1)  # a sweep runs the seeds of one point in succession
def compile_programs(key: CompileKey, mesh: Mesh) -> CompiledPrograms:
    """Compiles the programs of a run; equal keys on one mesh share them."""
    programs = make_programs(key.config, mesh, key.distillation, key.trials)
    steps = {count: programs.trace(step).lower().compile() for count, step in programs.steps.items()}
    step = steps[max(steps)] if steps else programs.trace_step().lower().compile()
    scored = programs.of_trials((programs.state.params, programs.eval_rows))
    return CompiledPrograms(
        trials=key.trials,
        init=programs.init.lower(jax.random.key(0)).compile(),
        step=step,
        steps=steps,
        evaluate=programs.evaluate.lower(*scored).compile(),
        put=programs.put,
        pick=programs.pick,
        state=programs.state,
        rows=programs.rows,
        eval_rows=programs.eval_rows,
        teacher=programs.teacher,
        compiled_step=step,
    )
