"""Training: the state, one step, and the loop.

`train_step` is a pure function, compiled once per shape and mesh; runs that differ only in seeds or learning
rate share the program.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mobilellm_jax import data, memory, model, partition, processes
from mobilellm_jax.checkpoint import Checkpoints
from mobilellm_jax.config import Config, ModelConfig, OptimizerConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import eval_step, inputs_and_targets, scores
from mobilellm_jax.files import AnyPath, is_bucket
from mobilellm_jax.metrics import Clock, MetricsLog
from mobilellm_jax.optimizer import learning_rate_schedule, make_optimizer
from mobilellm_jax.signals import noted_signals, stopped


class TrainState(NamedTuple):
    """All that a step changes. With the seeds in the config it determines the rest of the run."""

    step: Int[Array, ""]
    params: model.Params
    opt_state: optax.OptState


def init_state(key: PRNGKeyArray, model_config: ModelConfig, optimizer: OptimizerConfig) -> TrainState:
    """Returns the state before the first step."""
    params = model.init(key, model_config)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optimizer, model_config).init(params))


def gradients(
    params: model.Params, rows_AMS: Int[Array, "A M S"], config: ModelConfig
) -> tuple[Float[Array, ""], model.Params]:
    """Returns the mean loss in nats per token and its gradient over A micro-batches of M rows, S = T + 1."""

    def nats_and_count(params: model.Params, rows_MS: Int[Array, "M S"]) -> Any:
        return model.loss(params, *inputs_and_targets(rows_MS), config)

    def add(total: Any, rows_MS: Int[Array, "M S"]) -> tuple[Any, None]:
        value = jax.value_and_grad(nats_and_count, has_aux=True)(params, rows_MS)
        return jax.tree.map(jnp.add, total, value), None

    # The first micro-batch starts the sum, so that a batch in one piece costs no extra gradient buffer.
    value = jax.value_and_grad(nats_and_count, has_aux=True)(params, rows_AMS[0])
    if rows_AMS.shape[0] > 1:
        value, _ = jax.lax.scan(add, value, rows_AMS[1:])
    (nats, count), grads = value
    return nats / count, jax.tree.map(lambda g: g / count, grads)


def train_step(
    state: TrainState,
    rows_BS: Int[Array, "B S"],
    learning_rate: Float[Array, ""],
    model_config: ModelConfig,
    optimizer: OptimizerConfig,
    accumulation_steps: int,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Returns the state after one optimizer step on B rows of S = T + 1 tokens, and its metrics.

    Metrics: `loss` in nats per token before the step, `grad_norm` before clipping.
    """
    B, S = rows_BS.shape
    # Micro-batches take every A-th row, which leaves each device with its own rows.
    rows_AMS = rows_BS.reshape(B // accumulation_steps, accumulation_steps, S).swapaxes(0, 1)
    loss, grads = gradients(state.params, rows_AMS, model_config)
    with jax.named_scope("optimizer"):
        transformation = make_optimizer(optimizer, model_config)
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics


# --- the compiled programs ------------------------------------------------------------------------------

_LEVEL = "xla_backend_optimization_level"  # of LLVM


@dataclasses.dataclass(frozen=True)
class Programs:
    """`init_state`, `train_step` and `eval_step` with their shardings pinned, ready to compile or to run.

    Attributes:
      init: key -> state.
      step: (state, rows, learning_rate) -> (state, metrics); the state is donated.
      evaluate: (params, rows) -> sums.
      state: shapes, dtypes and shardings of the state.
      rows, eval_rows: the same, of a training and an evaluation batch.
    """

    init: Any
    step: Any
    evaluate: Any
    state: TrainState
    rows: jax.ShapeDtypeStruct
    eval_rows: jax.ShapeDtypeStruct


def make_programs(config: Config, mesh: Mesh | AbstractMesh) -> Programs:
    """Returns the programs of a run. Nothing is compiled; the mesh may be abstract."""
    m, o, t = config.model, config.optimizer, config.train
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), m, o))
    shardings = partition.shardings(shapes, mesh)
    batch, scalar = partition.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def with_sharding(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def rows(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, config.data.sequence_length + 1), jnp.int32, sharding=batch)

    def step(state: TrainState, rows: jax.Array, learning_rate: jax.Array) -> Any:
        with partition.in_use(mesh):
            return train_step(state, rows, learning_rate, m, o, t.accumulation_steps)

    def evaluate(params: model.Params, rows: jax.Array) -> Any:
        with partition.in_use(mesh):
            return eval_step(params, rows, m, config.data.is_task)

    return Programs(
        init=jax.jit(
            lambda key: init_state(key, m, o),
            out_shardings=shardings,
            # What draws normal random numbers takes LLVM 6 s, and runs once.
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
    """Returns the compiler's options for a step on a CPU, unless XLA_FLAGS has a level for all programs.

    Levels 1 to 3 give the same bits at the same speed, but 3, the default, takes a third longer to compile.
    """
    asked = jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "")
    return {_LEVEL: 1} if asked else None


@functools.lru_cache(maxsize=1)  # the runs of one point follow each other
def _compile(key: Config, mesh: Mesh) -> Programs:
    """Returns compiled programs; `key` is free of what they do not depend on."""
    programs = make_programs(key, mesh)
    learning_rate = jax.ShapeDtypeStruct((), jnp.float32)
    return dataclasses.replace(
        programs,
        init=programs.init.lower(jax.random.key(0)).compile(),
        step=programs.step.lower(programs.state, programs.rows, learning_rate).compile(),
        evaluate=programs.evaluate.lower(programs.state.params, programs.eval_rows).compile(),
    )


def _compile_key(config: Config) -> Config:
    """Returns `config` with the fields that compiled programs do not depend on set to fixed values."""
    schedule = {"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0}
    once = dict.fromkeys(["steps", "eval_every", "eval_rows", "checkpoint_every", "log_every"], 1)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, **schedule),
        train=dataclasses.replace(config.train, **once, init_seed=0, data_seed=0),
    )


# --- the loop -------------------------------------------------------------------------------------------


class _Diverged(Exception):
    """The loss is not finite at `step`."""

    def __init__(self, what: str, step: int):
        super().__init__(f"the {what} is not finite at step {step}; the last good step is {step - 1}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
      status: "finished", or "diverged" where the loss stopped being finite.
      error: for "diverged", at which step, and the last good one.
      steps: steps taken, up to the one that diverged.
      evaluations: {"step", "loss" (nats per token), "bits_per_byte", "error" (share of rows with a wrong
        answer)} in order; the last two are None where they have no meaning.
      train_curve: [step, loss in nats per token] at every progress line.
      train_s: seconds in training steps, over all sittings, without evaluations and checkpoints.
      compile_s, wall_s: seconds in compilation (near 0 where an earlier run had the same shape) and in all,
        of the last sitting.
    """

    status: str
    error: str | None
    steps: int
    evaluations: list[dict[str, Any]]
    train_curve: list[list[Any]]
    train_s: float
    compile_s: float
    wall_s: float


def train(
    config: Config,
    prepared: data.PreparedData | data.TaskData,
    mesh: Mesh,
    workdir: AnyPath,
    say: Callable[[str], None],
) -> Outcome:
    """Trains from scratch, or from the newest intact checkpoint in `workdir`, to `config.train.steps`.

    Leaves `metrics.jsonl`, TensorBoard events and checkpoints in `workdir`. `say` gets the progress lines.

    Raises:
      Interrupted, Preempted: on SIGINT, on SIGTERM or SIGHUP; a second call goes on where this one stopped.
      UserError: a step does not fit into memory, every checkpoint in `workdir` is damaged, or `workdir`
        cannot be written any more.
    """
    wall_start = time.perf_counter()
    t = config.train
    programs = _compile(_compile_key(config), mesh)
    memory.check_fits(programs.step, config)
    compile_s = time.perf_counter() - wall_start
    checkpoints = Checkpoints(workdir / "checkpoints")
    restored = checkpoints.restore_latest(programs.state)
    if restored is None:
        start, state = 0, programs.init(jax.random.key(t.init_seed))
    else:
        start, state = restored
        say(f"resuming after step {start:,}")
    checkpoints.delete_after(start)
    if is_bucket(workdir):
        say("no TensorBoard events in a bucket; metrics.jsonl has their numbers, up to the last checkpoint")
    log = MetricsLog(workdir, start, write=jax.process_index() == 0)
    learning_rates = _learning_rates(config.optimizer, t.steps)
    share = partition.process_share(mesh)
    batches = data.train_batches(
        prepared, batch_size=t.batch_size, seed=t.data_seed, start_step=start, **share
    )
    stops = processes.StopVote(mesh)
    tokens_per_step = t.batch_size * config.data.sequence_length
    bytes_per_token = prepared.bytes_per_token("valid")
    clock = Clock(start, log.train_s)
    train_s = clock.total  # up to the last step whose metrics were read

    def read(step: int, metrics: dict[str, Array]) -> None:
        """Waits for the metrics of a step and logs them where due."""
        nonlocal train_s
        loss, train_s = float(metrics["loss"]), clock.total
        diverged = not math.isfinite(loss)
        if step % t.log_every == 0 or step == t.steps or diverged:
            speed = clock.rate(step, tokens_per_step)
            log.train(step, loss, float(metrics["grad_norm"]), float(learning_rates[step - 1]), train_s)
            left = duration((t.steps - step) * tokens_per_step / speed)
            say(f"step {step:,}/{t.steps:,}  loss {loss:.4f}  {speed:,.0f} tokens/s  {left} left")
        if diverged:
            raise _Diverged("loss", step)

    def evaluate(step: int) -> float:
        loss, wrong = _evaluate(programs, state.params, prepared, config, share)
        # By the tokens per byte of all held-out text, also where `eval_rows` takes a part of it.
        bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
        log.evaluation(step, loss, bits, wrong)
        more = f"  {bits:.4f} bits/byte" if bits else "" if wrong is None else f"  {wrong:.1%} wrong"
        say(f"step {step:,}/{t.steps:,}  held-out loss {loss:.4f}{more}")
        if not math.isfinite(loss):
            raise _Diverged("held-out loss", step)
        return loss

    status, error, step = "finished", None, start
    pending: tuple[int, dict[str, Array]] | None = None  # metrics that the device may still be computing
    signals: Sequence[str] = ()
    try:
        # In this order, so that a signal still waits for the last save.
        with noted_signals() as signals, contextlib.closing(checkpoints):
            for step in range(start + 1, t.steps + 1):
                vote = stops.cast(bool(signals))  # before the step, to be counted when that is done
                rows = jax.make_array_from_process_local_data(programs.rows.sharding, next(batches))
                state, metrics = programs.step(state, rows, learning_rates[step - 1])
                if pending is not None:
                    read(*pending)  # while the device works on this step
                pending = (step, metrics)
                stop = bool(vote) and step < t.steps
                evaluate_now = step % t.eval_every == 0 or step == t.steps
                save_now = step % t.checkpoint_every == 0 or step == t.steps or stop
                if evaluate_now or save_now:
                    read(*pending)
                    pending = None
                    with clock.paused():
                        loss = evaluate(step) if evaluate_now else None
                        if save_now:
                            log.save(step, train_s)
                            log.flush()
                            checkpoints.save(step, state, loss)
                if stop:
                    raise stopped(signals, f"after step {step:,}; a checkpoint was saved")
                checkpoints.poll()
    except _Diverged as divergence:
        # At the first one: an update with such a gradient leaves no parameter finite to go on with.
        status, error, step = "diverged", str(divergence), divergence.step
    except UserError:
        with contextlib.suppress(UserError):  # the first trouble is the one to tell
            log.close()
        raise
    finally:
        log.close()
    if stops.cast(bool(signals)):  # too late for this run, but not for those that would follow
        raise stopped(signals, f"after step {step:,}, the last")
    return Outcome(
        status=status,
        error=error,
        steps=step,
        evaluations=log.evaluations,
        train_curve=log.train_curve,
        train_s=train_s,
        compile_s=compile_s,
        wall_s=time.perf_counter() - wall_start,
    )


@functools.lru_cache(maxsize=1)  # runs that differ in seeds share it; its program takes 0.1 s to compile
def _learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """Returns the learning rate of every step, float32 [steps]."""
    schedule = learning_rate_schedule(config, steps)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float32)


def _evaluate(
    programs: Programs,
    params: model.Params,
    prepared: data.PreparedData | data.TaskData,
    config: Config,
    share: dict[str, int],
) -> tuple[float, float | None]:
    """Returns the held-out loss in nats per token, and for tasks the fraction of rows with a wrong answer.

    `share` is that of this process in the rows, see `partition.process_share`.
    """
    t = config.train
    batches = data.eval_batches(prepared, batch_size=t.eval_batch_size, rows=t.eval_rows, **share)
    return evaluate_batches(programs, params, batches)


def evaluate_batches(
    programs: Programs, params: model.Params, batches: Iterator[np.ndarray]
) -> tuple[float, float | None]:
    """Returns the loss in nats per token, and for tasks the share of rows with a wrong answer.

    Batches are this process's part of rows of the shape of `programs.eval_rows`.
    """
    place = functools.partial(jax.make_array_from_process_local_data, programs.eval_rows.sharding)
    return scores(jax.device_get([programs.evaluate(params, place(rows)) for rows in batches]))


def duration(seconds: float) -> str:
    """Returns seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
