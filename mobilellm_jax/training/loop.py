"""The training loop: from a config and its data to checkpoints, a log and an outcome."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mobilellm_jax import data
from mobilellm_jax.config import Config, OptimizerConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition, processes
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training import memory
from mobilellm_jax.training.held_out import evaluate_held_out
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.programs import Programs, compile_key, compile_programs
from mobilellm_jax.training.progress import Diverged, Progress, every
from mobilellm_jax.training.signals import noted_signals, stopped
from mobilellm_jax.training.step import TrainState


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


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a run that stay the same while its state changes.

    Attributes:
      share: the share of this process in a batch, see `partition.process_share`.
      batches: of training rows, from the step to start with.
      learning_rates: of every step, float32 [steps].
    """

    config: Config
    prepared: data.Dataset
    programs: Programs
    checkpoints: Checkpoints
    share: dict[str, int]
    batches: Iterator[np.ndarray]
    learning_rates: np.ndarray
    stops: processes.StopVote
    progress: Progress


def train(
    config: Config,
    prepared: data.Dataset,
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
    programs = compile_programs(compile_key(config), mesh)
    memory.check_fits(programs.compiled_step, config)
    compile_s = time.perf_counter() - wall_start
    run, state = _start(config, prepared, programs, mesh, workdir, say)
    progress = run.progress
    status, error = "finished", None
    signals: Sequence[str] = ()
    try:
        # In this order, so that a signal still waits for the last save.
        with noted_signals() as signals, contextlib.closing(run.checkpoints):
            _take_steps(run, state, signals)
    except Diverged as divergence:
        # At the first one: an update with such a gradient leaves no parameter finite to go on with.
        status, error = "diverged", str(divergence)
    except UserError:
        with contextlib.suppress(UserError):  # the first trouble is the one to tell
            progress.close()
        raise
    finally:
        progress.close()
    if run.stops.cast(bool(signals)):  # too late for this run, but not for those that would follow
        raise stopped(signals, f"after step {progress.step:,}, the last")
    return Outcome(
        status=status,
        error=error,
        steps=progress.step,
        evaluations=progress.evaluations,
        train_curve=progress.train_curve,
        train_s=progress.train_s,
        compile_s=compile_s,
        wall_s=time.perf_counter() - wall_start,
    )


def _start(
    config: Config,
    prepared: data.Dataset,
    programs: Programs,
    mesh: Mesh,
    workdir: AnyPath,
    say: Callable[[str], None],
) -> tuple[_Run, TrainState]:
    """Restores the newest intact checkpoint, or initializes the state; prepares the rest of a run."""
    t = config.train
    checkpoints = Checkpoints(workdir / "checkpoints")
    restored = checkpoints.restore_latest(programs.state)
    if restored is None:
        start, state = 0, programs.init(jax.random.key(t.init_seed))
    else:
        start, state = restored
        say(f"resuming after step {start:,}")
    checkpoints.delete_after(start)
    share = partition.process_share(mesh)
    run = _Run(
        config=config,
        prepared=prepared,
        programs=programs,
        checkpoints=checkpoints,
        share=share,
        batches=prepared.train_batches(batch_size=t.batch_size, seed=t.data_seed, start_step=start, **share),
        learning_rates=_learning_rates(config.optimizer, t.steps),
        stops=processes.StopVote(mesh),
        progress=Progress(config, workdir, start, say),  # the last: it starts the clock
    )
    return run, state


def _take_steps(run: _Run, state: TrainState, signals: Sequence[str]) -> None:
    """Takes all steps that are left, evaluates and saves where due.

    Raises:
      Diverged: a loss is not finite.
      Interrupted, Preempted: this or another process noted a signal; a checkpoint was saved.
    """
    t, programs, progress = run.config.train, run.programs, run.progress
    for step in range(progress.step + 1, t.steps + 1):
        vote = run.stops.cast(bool(signals))  # before the step, to be counted when that is done
        rows = jax.make_array_from_process_local_data(programs.rows.sharding, next(run.batches))
        learning_rate = run.learning_rates[step - 1]
        state, metrics = programs.step(state, rows, learning_rate)
        progress.stepped(step, float(learning_rate), metrics)
        is_last = step == t.steps
        stop = bool(vote) and not is_last
        evaluate_now = is_last or every(t.eval_every, step)
        save_now = is_last or stop or every(t.checkpoint_every, step)
        if evaluate_now or save_now:
            progress.catch_up()
            with progress.paused():
                loss = None
                if evaluate_now:
                    scores = evaluate_held_out(programs, state.params, run.prepared, run.config, run.share)
                    progress.evaluated(scores)
                    loss = scores.loss
                if save_now:
                    progress.before_save()
                    run.checkpoints.save(step, state, loss)
        if stop:
            raise stopped(signals, f"after step {step:,}; a checkpoint was saved")
        run.checkpoints.poll()


@functools.lru_cache(maxsize=1)  # runs that differ in seeds share it; its program takes 0.1 s to compile
def _learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rate of every step, float32 [steps]."""
    schedule = learning_rate_schedule(config, steps)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float32)
