"""Progress of a run: what is read, logged and printed, and when; the clock of its steps."""

import math
import types

import jax.numpy as jnp
import pytest
from conftest import tiny_config

from mobilellm_jax.training import progress
from mobilellm_jax.training.held_out import Scores
from mobilellm_jax.training.progress import Diverged, Progress, every
from mobilellm_jax.training.step import Metrics


def metrics(loss: float) -> Metrics:
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0)}


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(tmp_path, said):
    (tmp_path / "metrics.jsonl").touch()
    run = Progress(tiny_config(**{"train.steps": 9, "train.log_every": 4}), tmp_path, 2, said.append)
    yield run
    run.close()


def test_metrics_are_read_one_step_later(run, said):
    for step in range(3, 6):
        run.stepped(step, 0.1, metrics(loss=step))
        assert run.step == step - 1
    assert [line.partition("  ")[0] for line in said] == ["step 4/9"]
    run.catch_up()
    run.catch_up()  # nothing is read twice
    assert run.step == 5
    for step in range(6, 10):
        run.stepped(step, 0.1, metrics(loss=step))
    run.catch_up()
    assert run.train_curve == [[4, 4.0], [8, 8.0], [9, 9.0]]  # every 4 steps, and the last


def test_a_loss_that_is_not_finite_is_logged_and_ends_the_run(run, said):
    run.stepped(3, 0.1, metrics(math.nan))
    with pytest.raises(Diverged, match=r"^the loss is not finite at step 3; the last good step is 2$"):
        run.stepped(4, 0.1, metrics(1.0))
    assert (run.step, run.train_curve, len(said)) == (3, [[3, None]], 1)


def test_scores_are_those_of_the_step_that_was_read(run, said):
    run.stepped(3, 0.1, metrics(1.0))
    run.catch_up()
    run.evaluated(Scores(2.0, 1.25, None))
    run.evaluated(Scores(2.0, None, 0.5))
    assert said == [
        "step 3/9  held-out loss 2.0000  1.2500 bits/byte",
        "step 3/9  held-out loss 2.0000  50.0% wrong",
    ]
    with pytest.raises(
        Diverged, match=r"^the held-out loss is not finite at step 3; the last good step is 2$"
    ):
        run.evaluated(Scores(math.inf, None, None))
    assert [(e["step"], e["loss"], e["error"]) for e in run.evaluations] == [
        (3, 2.0, None),
        (3, 2.0, 0.5),
        (3, None, None),
    ]


def test_every():
    assert [step for step in range(1, 10) if every(3, step)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3661.0, "1:01:01")]
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_the_clock_counts_from_an_earlier_sitting_on_and_stands_still_while_paused(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    clock = progress.Clock(step=10, total=100.0)
    now[0] += 2
    assert clock.total == 102
    assert clock.rate(step=11, tokens_per_step=8) == 4
    now[0] += 1
    with clock.paused():
        now[0] += 1000
    now[0] += 3
    assert clock.total == 106
    assert clock.rate(step=13, tokens_per_step=8) == 4  # of the steps since the last call
