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

from mobilellm_jax import data, model
from mobilellm_jax.config import Config, OptimizerConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition, processes
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training import memory
from mobilellm_jax.training.draws import loops_of_steps
from mobilellm_jax.training.held_out import Scores, evaluate_held_out
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.programs import Programs, compile_key, compile_programs
from mobilellm_jax.training.progress import Diverged, Progress, StepLine, duration, every
from mobilellm_jax.training.signals import noted_signals, stopped
from mobilellm_jax.training.start import Origin, first_state
from mobilellm_jax.training.step import TrainState
from mobilellm_jax.training.teacher import Teacher, place_teacher

_SLOW_S = 10.0  # compilation longer than this is said; programs from the cache take less


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
      status: "finished", or "diverged" if a loss was not finite.
      error: for "diverged", names the step and the last good step.
      steps: steps taken, including the one that diverged.
      evaluations: {"step", "loss" (nats per token), "bits_per_byte", "error" (share of rows with a wrong
        answer)} and what a task measures, in order; the middle two are None where they do not apply.
      train_curve: [step, loss in nats per token] at every progress line.
      train_s: seconds in training steps, summed over all resumptions, without evaluations and checkpoints.
      by_position, documents: of the last evaluation, see `held_out.by_position` and `by_document`; None for
        tasks and where the run diverged.
      measures: of the last evaluation of a task, `Record.measures`; None for text and where the run diverged.
      compile_s, wall_s: seconds since the last start or resumption: in compilation (near 0 if an earlier run
        had the same shape), and in total.
    """

    status: str
    error: str | None
    steps: int
    evaluations: list[dict[str, Any]]
    train_curve: list[list[Any]]
    train_s: float
    compile_s: float
    wall_s: float
    by_position: dict[str, list[Any]] | None = None
    documents: dict[str, list[Any]] | None = None
    measures: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything of a run but its training state.

    Attributes:
      share: selects the rows of this process in a batch, see `partition.process_share`.
      batches: training rows, starting at the first step to take.
      learning_rates: float32 [steps].
      loops: number of loops of each step, int [steps]; None where it is not drawn.
      teacher: its parameters, see `Programs`.
    """

    config: Config
    prepared: data.Dataset
    programs: Programs
    checkpoints: Checkpoints
    share: dict[str, int]
    batches: Iterator[np.ndarray]
    learning_rates: np.ndarray
    loops: np.ndarray | None
    teacher: tuple[model.Params, ...]
    stops: processes.StopVote
    progress: Progress


def train(
    config: Config,
    prepared: data.Dataset,
    mesh: Mesh,
    workdir: AnyPath,
    say: Callable[[str], None],
    origin: Origin | None = None,
    teacher: Teacher | None = None,
) -> Outcome:
    """Trains from the newest intact checkpoint in `workdir`, or from `origin`, to `config.train.steps`.

    Without `origin`, the first parameters are random. Writes `metrics.jsonl`, TensorBoard events and
    checkpoints to `workdir`. `say` gets the progress lines.

    Raises:
      Interrupted, Preempted: on SIGINT, on SIGTERM or SIGHUP; a second call resumes.
      UserError: a step does not fit into memory, every checkpoint in `workdir` is corrupt, or writing to
        `workdir` failed.
    """
    wall_start = time.perf_counter()
    programs = compile_programs(compile_key(config, teacher.distillation if teacher else None), mesh)
    memory.check_fits(programs.compiled_step, config)
    compile_s = time.perf_counter() - wall_start
    if compile_s > _SLOW_S:
        say(StepLine.at(0.0, f"compiled in {duration(compile_s)}"))
    run, state = _start(config, prepared, programs, mesh, workdir, say, origin, teacher)
    progress = run.progress
    status, error, scores = "finished", None, None
    signals: Sequence[str] = ()
    try:
        # In this order, so that signals are still noted, not acted on, while the last save finishes.
        with noted_signals() as signals, contextlib.closing(run.checkpoints):
            scores = _take_steps(run, state, signals)
    except Diverged as divergence:
        # Stop at the first: an update with a gradient that is not finite destroys all parameters.
        status, error = "diverged", str(divergence)
    except UserError:
        with contextlib.suppress(UserError):  # report the first error, not that of closing
            progress.close()
        raise
    finally:
        progress.close()
    if run.stops.cast(bool(signals)):  # this run is complete, but the sweep's next ones must not start
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
        by_position=scores.by_position if scores else None,
        documents=scores.documents if scores else None,
        measures=scores.task if scores else None,
    )


def _start(
    config: Config,
    prepared: data.Dataset,
    programs: Programs,
    mesh: Mesh,
    workdir: AnyPath,
    say: Callable[[str], None],
    origin: Origin | None,
    teacher: Teacher | None,
) -> tuple[_Run, TrainState]:
    """Restores the newest intact checkpoint or initializes the state, and opens data, log and schedule."""
    t = config.train
    checkpoints = Checkpoints(workdir / "checkpoints")
    restored = checkpoints.restore_latest(programs.state)
    if restored is None:
        start, state = 0, first_state(programs, config, origin, mesh)
    else:
        start, state = restored
        say(f"resuming after step {start:,}")
    checkpoints.delete_after(start)
    share = partition.process_share(mesh)
    first = start + (origin.first_batch if origin else 0)
    run = _Run(
        config=config,
        prepared=prepared,
        programs=programs,
        checkpoints=checkpoints,
        share=share,
        batches=prepared.train_batches(batch_size=t.batch_size, seed=t.data_seed, start_step=first, **share),
        learning_rates=_learning_rates(config.optimizer, t.steps),
        loops=loops_of_steps(config),
        teacher=place_teacher(programs, teacher, mesh),
        stops=processes.StopVote(mesh),
        progress=Progress(config, workdir, start, say),  # last, because it starts the clock
    )
    return run, state


def _take_steps(run: _Run, state: TrainState, signals: Sequence[str]) -> Scores:
    """Takes all remaining steps, with evaluations and checkpoints where due, and gives the last scores.

    Raises:
      Diverged: a loss is not finite.
      Interrupted, Preempted: this or another process noted a signal; a checkpoint was saved.
    """
    t, programs, progress, scores = run.config.train, run.programs, run.progress, None

    def evaluate(state: TrainState) -> Scores:
        return evaluate_held_out(programs, state.params, run.prepared, run.config, run.share)

    for step in range(progress.step + 1, t.steps + 1):
        vote = run.stops.cast(bool(signals))  # queued before the step: reading it does not wait for that
        rows = jax.make_array_from_process_local_data(programs.rows.sharding, next(run.batches))
        learning_rate = run.learning_rates[step - 1]
        take = programs.step if run.loops is None else programs.steps[int(run.loops[step - 1])]
        state, metrics = take(state, rows, learning_rate, *run.teacher)
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
                    scores = evaluate(state)
                    progress.evaluated(scores)
                    loss = scores.loss
                if save_now:
                    progress.before_save()
                    run.checkpoints.save(step, state, loss)
        if stop:
            raise stopped(signals, f"after step {step:,}; a checkpoint was saved")
        run.checkpoints.poll()
    return scores or evaluate(state)  # none where the run was interrupted after its last step


@functools.lru_cache(maxsize=1)  # runs that differ in seeds only share it; it takes 0.1 s to compile
def _learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """Evaluates the schedule at every step: float32 [steps]."""
    schedule = learning_rate_schedule(config, steps)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float32)
