"""The training loop: from a config and its data to checkpoints, a log and an outcome."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mobilellm_jax.training.held_out import Scores, evaluate_held_out, evaluate_together
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.programs import Programs, compile_key, compile_programs
from mobilellm_jax.training.progress import Diverged, Progress, StepLine, duration, every
from mobilellm_jax.training.signals import noted_signals, stopped
from mobilellm_jax.training.start import Origin, first_state
from mobilellm_jax.training.step import Metrics, TrainState
from mobilellm_jax.training.teacher import Teacher, place_teacher
from mobilellm_jax.training.trials import check_same_program, place_rows, rates_of, stack, state_of

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
      measures: of the last evaluation of a task or of API calls, `Record.measures`; None for other text and
        where the run diverged.
      compile_s, wall_s: seconds since the last start or resumption: in compilation (near 0 if an earlier run
        had the same shape), and in total.
      trials: number of runs in the program, whose times are those of all.
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
    trials: int = 1


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run that is to be trained, see `train`."""

    config: Config
    prepared: data.Dataset
    workdir: AnyPath
    say: Callable[[str], None]
    origin: Origin | None = None


@dataclasses.dataclass
class _Run:
    """A run in training: everything but its state.

    Attributes:
      trial: what was asked for.
      checkpoints, progress: its own.
      batches: training rows, starting at the first step to take.
      learning_rates: float32 [steps].
      loops: number of loops of each step, int [steps]; None where it is not drawn.
      step: the last step taken.
      scores: of the last evaluation.
      error: why it diverged; "" if it has not.
    """

    trial: Trial
    checkpoints: Checkpoints
    progress: Progress
    batches: Iterator[np.ndarray]
    learning_rates: np.ndarray
    loops: np.ndarray | None
    step: int
    scores: Scores | None = None
    error: str = ""

    @property
    def is_over(self) -> bool:
        return bool(self.error) or self.is_complete

    @property
    def is_complete(self) -> bool:
        return self.step == self.trial.config.train.steps

    def stepped(self, metrics: Metrics) -> None:
        """Counts a step that was just dispatched; what is read is the step before."""
        self.step += 1
        with self.until_divergence():
            self.progress.stepped(self.step, float(self.learning_rates[self.step - 1]), metrics)

    def is_due(self, steps: int) -> bool:
        """True for what is done every so many steps and after the last, unless the run has diverged."""
        return not self.error and (self.is_complete or every(steps, self.step))

    @contextlib.contextmanager
    def until_divergence(self) -> Iterator[None]:
        """Ends this run alone at the first loss that is not finite: its parameters are lost by then."""
        try:
            yield
        except Diverged as divergence:
            self.error = str(divergence)


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Runs that train together, or one alone.

    Attributes:
      by_place: the runs, see `trials.py`.
      programs: those of all runs, compiled.
      share: selects the rows of this process in a batch, see `partition.process_share`.
      teacher: its parameters, see `Programs`.
      stops: has all processes stop after the same step, see `processes.StopVote`.
    """

    by_place: Mapping[int, _Run]
    programs: Programs
    share: dict[str, int]
    teacher: tuple[model.Params, ...]
    stops: processes.StopVote

    def take_step(self, state: TrainState, runs: Mapping[int, _Run]) -> TrainState:
        """Takes the next step of these runs, which may be at different ones."""
        programs = self.programs
        rows = place_rows(programs, programs.rows, {at: next(run.batches) for at, run in runs.items()})
        rates = rates_of(programs, {at: run.learning_rates[run.step] for at, run in runs.items()})
        run = next(iter(runs.values()))  # loops are drawn by a run alone only
        take = programs.step if run.loops is None else programs.steps[int(run.loops[run.step])]
        state, metrics = take(state, rows, rates, *self.teacher)
        for run in runs.values():
            run.stepped(metrics)
        return state

    def evaluate(self, state: TrainState, runs: Mapping[int, _Run]) -> dict[int, Scores]:
        programs, share = self.programs, self.share
        asked = {at: (run.trial.prepared, run.trial.config) for at, run in runs.items()}
        if programs.trials == 1:
            return {at: evaluate_held_out(programs, state.params, *asked[at], share) for at in asked}
        return evaluate_together(programs, state.params, asked, share)

    def evaluate_and_save(self, state: TrainState, runs: Mapping[int, _Run], stop: bool) -> None:
        """Evaluates and saves those of `runs` of which that is due; with `stop` saves all."""
        scored = {at: run for at, run in runs.items() if run.is_due(run.trial.config.train.eval_every)}
        saved = {
            at: run
            for at, run in runs.items()
            if run.is_due(run.trial.config.train.checkpoint_every) or (stop and not run.error)
        }
        for run in (scored | saved).values():
            with run.until_divergence():
                run.progress.catch_up()
        scored = {at: run for at, run in scored.items() if not run.error}
        if not scored and not saved:
            return
        with contextlib.ExitStack() as paused:
            for run in self.by_place.values():
                paused.enter_context(run.progress.paused())
            found = self.evaluate(state, scored)
            for at, run in scored.items():
                with run.until_divergence():
                    run.progress.evaluated(found[at])
                    run.scores = found[at]
            for at, run in saved.items():
                if not run.error:
                    run.progress.before_save()
                    loss = found[at].loss if at in found else None
                    run.checkpoints.save(run.step, state_of(self.programs, state, at), loss)


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
    return train_together({0: Trial(config, prepared, workdir, say, origin)}, 1, mesh, teacher)[0]


def train_together(
    trials: Mapping[int, Trial], count: int, mesh: Mesh, teacher: Teacher | None = None
) -> dict[int, Outcome]:
    """`train` of several runs in one program, each with all that is its own; errors as there.

    They may be at different steps, as after a kill, and one that diverges ends alone.

    Args:
      trials: the runs by place, from 0 to `count` - 1. A run that resumes at the same place of as many is bit
        for bit the same as one that was never stopped; at another or alone it agrees within rounding.
      count: places of the program.
      mesh: of the devices.
      teacher: that of all.

    Raises:
      UserError: as in `train`, or runs differ in a field that changes the program.
    """
    wall_start = time.perf_counter()
    configs = [trial.config for trial in trials.values()]
    check_same_program(configs)
    key = compile_key(configs[0], teacher.distillation if teacher else None, count)
    programs = compile_programs(key, mesh)
    memory.check_fits(programs.compiled_step, configs[0], count)
    compile_s = time.perf_counter() - wall_start
    if compile_s > _SLOW_S:
        next(iter(trials.values())).say(StepLine.at(0.0, f"compiled in {duration(compile_s)}"))
    runs, state = _start(trials, programs, mesh, teacher)
    signals: Sequence[str] = ()
    try:
        # In this order, so that signals are still noted, not acted on, while the last save finishes.
        with noted_signals() as signals, contextlib.ExitStack() as closed:
            for run in runs.by_place.values():
                closed.enter_context(contextlib.closing(run.checkpoints))
            _take_steps(runs, state, signals)
    except UserError:
        for run in runs.by_place.values():
            with contextlib.suppress(UserError):  # report the first error, not that of closing
                run.progress.close()
        raise
    finally:
        with contextlib.ExitStack() as closed:
            for run in runs.by_place.values():
                closed.callback(run.progress.close)
    if runs.stops.cast(bool(signals)):  # these runs are complete, but the sweep's next ones must not start
        last = max(run.progress.step for run in runs.by_place.values())
        raise stopped(signals, f"after step {last:,}, the last")
    wall_s = time.perf_counter() - wall_start
    return {at: _outcome(run, compile_s, wall_s, count) for at, run in runs.by_place.items()}


def _outcome(run: _Run, compile_s: float, wall_s: float, trials: int) -> Outcome:
    progress, scores = run.progress, None if run.error else run.scores
    return Outcome(
        status="diverged" if run.error else "finished",
        error=run.error or None,
        steps=progress.step,
        evaluations=progress.evaluations,
        train_curve=progress.train_curve,
        train_s=progress.train_s,
        compile_s=compile_s,
        wall_s=wall_s,
        by_position=scores.by_position if scores else None,
        documents=scores.documents if scores else None,
        measures=scores.task if scores else None,
        trials=trials,
    )


def _start(
    trials: Mapping[int, Trial], programs: Programs, mesh: Mesh, teacher: Teacher | None
) -> tuple[_Runs, TrainState]:
    """Restores the newest intact checkpoints or initializes the states; opens data, logs and schedules."""
    checkpoints, starts, runs = dict[int, Checkpoints](), dict[int, int](), dict[int, _Run]()

    def states() -> Iterator[tuple[int, TrainState]]:
        for at, trial in trials.items():
            starts[at], state = _first_state(trial, programs, checkpoints[at], mesh)
            yield at, state

    with contextlib.ExitStack() as closed:  # where an error comes before the last is open
        for at, trial in trials.items():
            checkpoints[at] = Checkpoints(trial.workdir / "checkpoints")
            closed.callback(checkpoints[at].close)
        state, share = stack(programs, states()), partition.process_share(mesh)
        placed, stops = place_teacher(programs, teacher, mesh), processes.StopVote(mesh)
        for at, trial in trials.items():
            t, start = trial.config.train, starts[at]
            first = start + (trial.origin.first_batch if trial.origin else 0)
            runs[at] = _Run(
                trial=trial,
                checkpoints=checkpoints[at],
                batches=trial.prepared.train_batches(
                    batch_size=t.batch_size, seed=t.data_seed, start_step=first, **share
                ),
                learning_rates=_learning_rates(trial.config.optimizer, t.steps),
                loops=loops_of_steps(trial.config),
                step=start,
                # Last: it starts the clock.
                progress=Progress(trial.config, trial.workdir, start, trial.say, at),
            )
            closed.callback(runs[at].progress.close)
        closed.pop_all()  # from here on `train_together` closes them
    return _Runs(runs, programs, share, placed, stops), state


def _first_state(
    trial: Trial, programs: Programs, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[int, TrainState]:
    """The step and the state that a run starts or resumes from; later checkpoints are deleted."""
    restored = checkpoints.restore_latest(programs.state)
    if restored is None:
        restored = 0, first_state(programs, trial.config, trial.origin, mesh)
    else:
        trial.say(f"resuming after step {restored[0]:,}")
    checkpoints.delete_after(restored[0])
    return restored


def _take_steps(runs: _Runs, state: TrainState, signals: Sequence[str]) -> None:
    """Takes all remaining steps, with evaluations and checkpoints where due.

    Raises:
      Interrupted, Preempted: this or another process noted a signal; a checkpoint was saved.
    """
    complete = {at: run for at, run in runs.by_place.items() if run.is_complete}  # interrupted after that
    for at, scores in runs.evaluate(state, complete).items():  # at once, as steps spoil what is over
        complete[at].scores = scores
    while at_work := {at: run for at, run in runs.by_place.items() if not run.is_over}:
        vote = runs.stops.cast(bool(signals))  # queued before the step: reading it does not wait for that
        state = runs.take_step(state, at_work)
        stop = bool(vote) and not all(run.is_over for run in at_work.values())
        runs.evaluate_and_save(state, at_work, stop)
        if stop and not all(run.is_over for run in at_work.values()):
            step = max(run.step for run in at_work.values())
            raise stopped(signals, f"after step {step:,}; a checkpoint was saved")
        for run in at_work.values():
            run.checkpoints.poll()


@functools.lru_cache(maxsize=64)  # runs that differ in seeds only share it; it takes 0.1 s to compile
def _learning_rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """Evaluates the schedule at every step: float32 [steps]."""
    schedule = learning_rate_schedule(config, steps)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float32)
