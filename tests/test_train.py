"""The training step against plain references; the loop against kills, signals and divergence."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import command, start
from conftest import SHARING, assert_trees_close, loss_and_gradients, tiny_config

from mobilellm_jax import data
from mobilellm_jax.config import REMAT_POLICIES, MeshConfig, from_config_dict
from mobilellm_jax.errors import Preempted
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.directory import open_tokenizer, read_config
from mobilellm_jax.runs.run import measured_fields
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.training import loop, progress
from mobilellm_jax.training.held_out import Scores
from mobilellm_jax.training.loop import train
from mobilellm_jax.training.optimizer import learning_rate_schedule
from mobilellm_jax.training.programs import make_programs
from mobilellm_jax.training.step import init_state, train_step

GOLDENS = Path(__file__).parent / "goldens" / "losses.txt"


# Adam's first step is the sign of the gradient, rounding errors included, unless epsilon is large.
SMOOTH = {"optimizer.epsilon": 1e-2}

init = jax.jit(init_state, static_argnums=(1, 2))
step = jax.jit(train_step, static_argnums=(3, 4, 5))


def rows_of(config, seed=0):
    shape = (config.train.batch_size, config.data.sequence_length + 1)
    return np.random.default_rng(seed).integers(0, config.model.vocab_size, shape, dtype=np.int32)


def one_step(config, learning_rate=0.1):
    m, o = config.model, config.optimizer
    state = init(jax.random.key(0), m, o)
    rate = jnp.float32(learning_rate)
    return step(state, jnp.asarray(rows_of(config)), rate, m, o, config.train.accumulation_steps)


@pytest.mark.parametrize("accumulation_steps", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_accumulation_changes_nothing(accumulation_steps):
    whole, whole_metrics = one_step(tiny_config(**SMOOTH))
    parts, parts_metrics = one_step(tiny_config(**SMOOTH, **{"train.accumulation_steps": accumulation_steps}))
    assert_trees_close(parts.params, whole.params, tolerance=1e-5)
    assert parts_metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), rel=1e-6)


def test_a_step_is_optax_adamw():
    """The learning rate as an argument is the same as optax.adamw with the rate inside."""
    config = tiny_config(**SMOOTH)
    o = config.optimizer
    state, _ = one_step(config, learning_rate=0.1)
    params = init(jax.random.key(0), config.model, o).params
    rows = rows_of(config)
    (_, count), grads = loss_and_gradients(params, rows[:, :-1], rows[:, 1:], config.model)
    grads = jax.tree.map(lambda gradient: gradient / count, grads)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "gain" not in str(path), params)
    reference = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(0.1, o.beta1, o.beta2, o.epsilon, weight_decay=o.weight_decay, mask=mask),
    )
    updates, _ = jax.jit(reference.update)(grads, jax.jit(reference.init)(params), params)
    assert_trees_close(state.params, optax.apply_updates(params, updates), tolerance=1e-5)


@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_a_step_on_8_devices_equals_one_on_1(shape):
    config = tiny_config(**SMOOTH, **{"model.sharing": "reverse", "model.num_repeats": 2})
    expected, expected_metrics = one_step(config)
    mesh = partition.make_mesh(MeshConfig(**dict(zip(partition.AXES, shape, strict=True))))
    programs = make_programs(config, mesh)
    rows = jax.device_put(rows_of(config), programs.rows.sharding)
    state, metrics = programs.step(programs.init(jax.random.key(0)), rows, np.float32(0.1))
    assert_trees_close(jax.device_get(state), jax.device_get(expected), tolerance=2e-5)
    assert metrics["loss"] == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    query = state.params["blocks"]["attention"]["query"]
    assert query.sharding.shard_shape(query.shape)[1] == query.shape[1] // shape[1]


@pytest.mark.parametrize(
    "remat", [pytest.param(r, marks=[pytest.mark.slow] * (r != "dots")) for r in REMAT_POLICIES]
)
def test_a_step_in_bfloat16_is_nearly_one_in_float32(remat):
    """Also for what XLA on a CPU has no product for, unless it is kept from transposing its result."""
    fields = {"data.sequence_length": 64, "model.loss_chunk": 64, **SMOOTH}
    _, half = one_step(tiny_config(**fields, **{"model.compute_dtype": "bfloat16", "model.remat": remat}))
    _, full = one_step(tiny_config(**fields, **{"model.compute_dtype": "float32"}))  # compiled once
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(float(half[name]), float(full[name]), rtol=0.02)


def test_golden_losses():
    """20 steps for each strategy. A change that is meant to move them runs with UPDATE_GOLDENS=1 once."""
    losses = golden_losses()
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDENS.write_text("\n".join(f"{name}: {json.dumps(row)}" for name, row in losses.items()) + "\n")
    lines = (line.split(": ") for line in GOLDENS.read_text().splitlines())
    expected = {name: json.loads(row) for name, row in lines}
    assert losses.keys() == expected.keys()
    for name, row in losses.items():
        np.testing.assert_allclose(row, expected[name], rtol=2e-5, err_msg=f"{name}; see the docstring")


def golden_losses() -> dict[str, list[float]]:
    result = {}
    for sharing in SHARING:
        config = tiny_config(**{f"model.{k}": v for k, v in sharing.items()}, **{"train.steps": 20})
        m, o = config.model, config.optimizer
        schedule = learning_rate_schedule(dataclasses.replace(o, learning_rate=0.01), 20)
        state, losses = init(jax.random.key(0), m, o), []
        for i in range(20):
            state, metrics = step(
                state, jnp.asarray(rows_of(config, i % 3)), jnp.float32(schedule(i)), m, o, 1
            )
            losses.append(round(float(metrics["loss"]), 6))
        result[m.sharing] = losses
    return result


# --- the loop ---


@pytest.fixture
def corpus(tmp_path):
    """A corpus of 60 short documents, and the overrides that use it."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(f"word{(i * j) % 17}" for j in range(40)))
    return {
        "model.vocab_size": 264,
        "data.source": f"files:{folder}/*.txt",
        "data.tokenizer": "bytes",
        "data.valid_fraction": 0.2,
        "data.cache_dir": str(tmp_path / "cache"),
        "train.steps": 12,
        "train.eval_every": 4,
        "train.checkpoint_every": 4,
        "train.log_every": 1,
        "train.eval_rows": 16,
    }


def run_loop(config, workdir, signal_at=None):
    """Trains, and returns the outcome and the lines said; gets a SIGTERM as soon as `signal_at` is said."""
    workdir.mkdir(parents=True, exist_ok=True)
    prepared = data.prepare(config.data, config.model.vocab_size)
    mesh = partition.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    lines = []

    def say(line):
        lines.append(line)
        if signal_at and signal_at in line:
            signal.raise_signal(signal.SIGTERM)

    return train(config, prepared, mesh, workdir, say), lines


def test_the_loop_learns_evaluates_and_logs(tmp_path, corpus):
    outcome, lines = run_loop(tiny_config(**corpus), tmp_path / "run")
    assert outcome.status == "finished"
    assert [e["step"] for e in outcome.evaluations] == [4, 8, 12]
    assert outcome.evaluations[-1]["loss"] < outcome.evaluations[0]["loss"] < np.log(264) + 0.1
    assert outcome.evaluations[0].keys() == {"step", "loss", "bits_per_byte", "error"}
    assert outcome.evaluations[0]["error"] is None
    assert outcome.evaluations[0]["bits_per_byte"] > 0
    assert len(outcome.train_curve) == 12
    assert lines[str(lines[0]).startswith("compiled in")].startswith("step 1/12")  # said where it took long
    assert "held-out loss" in lines[-1]


@pytest.mark.parametrize("signal_at", ["step 12/12  loss", "step 12/12  held-out loss"])
def test_a_signal_in_the_last_step_stops_what_would_follow(tmp_path, corpus, signal_at):
    config = tiny_config(**corpus)
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM after step 12, the last$"):
        run_loop(config, tmp_path / "run", signal_at)
    outcome, lines = run_loop(config, tmp_path / "run")
    assert (outcome.status, outcome.steps, lines) == ("finished", 12, ["resuming after step 12"])
    assert [e["step"] for e in outcome.evaluations] == [4, 8, 12]


def test_a_resumed_run_counts_the_time_of_all_its_steps(tmp_path, corpus, monkeypatch):
    """Though its log has a line for the last of them only. What a killed save left is gone."""
    config = tiny_config(**{**corpus, "train.log_every": 12, "train.eval_every": 6})
    with pytest.raises(Preempted, match="after step 7; a checkpoint was saved"):
        run_loop(config, tmp_path / "run", "step 6/12  held-out loss")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    (saved,) = [line for line in map(json.loads, text.splitlines()) if line["step"] == 7]
    clocks, clock = [], progress.Clock
    monkeypatch.setattr(progress, "Clock", lambda *start: clocks.append(start) or clock(*start))
    for leftover in ("9", "8.orbax-checkpoint-tmp-1"):
        (tmp_path / "run" / "checkpoints" / leftover).mkdir()
    outcome, _ = run_loop(config, tmp_path / "run")
    assert saved["kind"] == "save"
    assert clocks == [(7, saved["train_s"])]
    assert 0 < saved["train_s"] < outcome.train_s
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"8", "12"}


def test_the_time_of_the_steps_is_without_the_last_checkpoint(tmp_path, corpus, monkeypatch):
    close = Checkpoints.close

    def slow_close(checkpoints):
        time.sleep(0.5)
        close(checkpoints)

    monkeypatch.setattr(Checkpoints, "close", slow_close)
    outcome, _ = run_loop(tiny_config(**{**corpus, "train.steps": 4}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert outcome.train_s == pytest.approx(lines[-1]["train_s"], abs=1e-3)
    assert lines[-1]["kind"] == "save"


SAME_BITS = """
import jax, numpy as np
from configs import base
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.parallel import partition
from mobilellm_jax.training import programs as training_programs

small = {"model.depth": 2, "model.width": 48, "model.num_heads": 3}
config = from_config_dict(base.update(base.get_config(), small))
programs = training_programs.make_programs(config, partition.make_mesh(config.mesh))
rows = np.random.default_rng(0).integers(0, 2048, programs.rows.shape, np.int32)
lowered = programs.trace_step().lower()
ends = []
for options in ({}, {"xla_backend_optimization_level": 3}):
    step, state = lowered.compile(compiler_options=options), programs.init(jax.random.key(0))
    for _ in range(2):
        state, _ = step(state, rows, np.float32(0.01))
    ends.append(jax.device_get(state))
jax.tree.map(np.testing.assert_array_equal, *ends)
print(training_programs._fast_to_compile())
"""


@pytest.mark.slow  # 7 s, and it depends on the version of jaxlib only
def test_the_fast_compilation_gives_the_same_bits():
    """Without the flags of the tests, which have XLA compile in another way."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    line = [sys.executable, "-c", SAME_BITS]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "{'xla_backend_optimization_level': 1}\n"), done.stderr


def test_the_loop_counts_wrong_answers(tmp_path, corpus):
    task = {"data.source": "recall:pairs=2,symbols=2,queries=2", "data.sequence_length": 9}
    config = tiny_config(**{**corpus, **task, "train.eval_every": 12, "optimizer.learning_rate": 0.01})
    outcome, lines = run_loop(config, tmp_path / "run")
    (evaluation,) = outcome.evaluations
    assert evaluation["bits_per_byte"] is None
    assert 0 < evaluation["error"] < 1
    assert evaluation["error"] * 16 == int(evaluation["error"] * 16)  # of 16 rows
    assert f"{evaluation['error']:.1%} wrong" in lines[-1]


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path, corpus):
    config = tiny_config(**corpus, **{"optimizer.learning_rate": 1e30, "optimizer.schedule": "constant"})
    outcome, _ = run_loop(config, tmp_path / "run")
    assert outcome.status == "diverged"
    step, loss = outcome.train_curve[-1]
    assert loss is None
    assert all(np.isfinite(loss) for _, loss in outcome.train_curve[:-1])
    assert outcome.error == f"the loss is not finite at step {step}; the last good step is {step - 1}"
    assert outcome.steps == step < config.train.steps


def test_a_held_out_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(loop, "evaluate_held_out", lambda *_: Scores(math.inf, None, None))
    outcome, _ = run_loop(tiny_config(**corpus), tmp_path / "run")
    assert (outcome.status, outcome.steps) == ("diverged", 4)
    assert outcome.evaluations[-1]["loss"] is None
    fields = measured_fields(tiny_config(**corpus), {}, outcome)
    assert fields["final"] is fields["best"] is None
    assert not list((tmp_path / "run" / "checkpoints").glob("4"))


def training(workdir, corpus):
    overrides = {
        **{f"model.{k}": v for k, v in {"depth": 2, "width": 16, "num_heads": 2, "ffn_width": 16}.items()},
        **corpus,
        "train.steps": 40,
        "train.batch_size": 4,
        "train.eval_batch_size": 4,
        "optimizer.warmup_steps": 2,
        "data.sequence_length": 32,
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    return ["experiments.train", f"--workdir={workdir}", *flags]


def interrupted(tmp_path, workdir, corpus, number, after_step):
    """Starts a run, sends it a signal once its log has reached a step, and returns the finished process."""
    process = start(*training(workdir, corpus), env={"HOME": str(tmp_path)})
    for line in process.stdout:
        if line.startswith(f"step {after_step}/"):
            process.send_signal(number)
            break
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def contents(workdir):
    """Returns parameters and optimizer state of the last checkpoint, and the log without times and saves."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] != "save"]
    for line in lines:
        line.pop("train_s", None)
        line.pop("sha256")  # of the times, too
    config = from_config_dict(read_config(workdir / "config.json"))
    mesh = partition.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    checkpoints = Checkpoints(workdir / "checkpoints")
    step, state = checkpoints.restore_latest(make_programs(config, mesh).state)
    checkpoints.close()
    return step, jax.device_get(state), lines


@pytest.mark.slow
def test_killed_or_interrupted_and_resumed_is_bit_for_bit_the_same(tmp_path, corpus):
    straight, killed, stopped = (tmp_path / name for name in ("straight", "killed", "stopped"))

    def resume(workdir):
        done = command(*training(workdir, corpus), env={"HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return done

    resume(straight)
    code, _ = interrupted(tmp_path, killed, corpus, signal.SIGKILL, after_step=11)
    assert code == -signal.SIGKILL
    code, stderr = interrupted(tmp_path, stopped, corpus, signal.SIGTERM, after_step=7)
    assert code == 75
    assert "a checkpoint was saved" in stderr
    assert "Traceback" not in stderr
    assert "resuming after step" in resume(killed).stdout
    assert "resuming after step" in resume(stopped).stdout
    assert open_tokenizer(straight).spec == corpus["data.tokenizer"]
    step, state, lines = contents(straight)
    assert step == 40
    for other in (killed, stopped):
        other_step, other_state, other_lines = contents(other)
        assert other_step == 40
        assert_trees_close(other_state, state, tolerance=0)
        assert other_lines == lines


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_with_room_it_goes_on_the_same(tmp_path, corpus, small_disk):
    def run(workdir):
        return command(*training(workdir, corpus), env={"HOME": str(tmp_path)})

    assert run(tmp_path / "straight").returncode == 0
    one = sum(path.stat().st_size for path in (tmp_path / "straight").rglob("*")) // 3  # of 3 checkpoints
    padding = small_disk / "padding"
    padding.write_bytes(bytes(shutil.disk_usage(small_disk).free - int(3.2 * one)))
    stopped = run(small_disk / "run")
    assert stopped.returncode == 2
    assert re.fullmatch(
        r"error: .*: No space left on device(; earlier checkpoints kept: .*)?\n", stopped.stderr
    ), stopped.stderr
    padding.unlink()
    going_on = run(small_disk / "run")
    assert "resuming after step" in going_on.stdout, stopped
    (step, state, lines), (other_step, other_state, other_lines) = (
        contents(workdir) for workdir in (tmp_path / "straight", small_disk / "run")
    )
    assert (step, lines) == (other_step, other_lines)
    assert_trees_close(other_state, state, tolerance=0)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused = run(small_disk / "run2")
    assert refused.returncode == 2
    assert "cannot write there (Read-only file system)" in refused.stderr
