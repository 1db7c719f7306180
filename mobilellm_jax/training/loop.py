"""The training loop: from a config and its data to checkpoints, a log and an outcome."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from mobilellm_jax import data
from mobilellm_jax.config import Config, OptimizerConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition, processes
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.storage.files import AnyPath, is_bucket
from mobilellm_jax.storage.metrics import Clock, MetricsLog
from mobilellm_jax.training import memory
from mobilellm_jax.training.held_out import evaluate_held_out
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.programs import compile_key, compile_programs
from mobilellm_jax.training.signals import noted_signals, stopped


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
    programs = compile_programs(compile_key(config), mesh)
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
        loss, wrong = evaluate_held_out(programs, state.params, prepared, config, share)
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


def duration(seconds: float) -> str:
    """Returns seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
