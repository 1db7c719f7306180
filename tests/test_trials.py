"""Several runs in one program: each is the run it would be alone, whatever becomes of the others."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from subprocess import PIPE

import jax
import numpy as np
import pytest
from commands import command
from conftest import assert_trees_close, tiny_config
from test_measures import describe
from test_sweep import losses, points, write_study

from experiments.runner import flags, sweeping, trials
from experiments.runner.costs import memory_bytes
from mobilellm_jax import data
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.errors import Preempted, UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs import run as runs
from mobilellm_jax.runs.teacher import open_teacher
from mobilellm_jax.storage.checkpoint import Checkpoints
from mobilellm_jax.training import memory
from mobilellm_jax.training.loop import Trial, train, train_together
from mobilellm_jax.training.programs import make_programs

STRUCTURE = "structure:levels=2,symbols=3,rules=2,grammar=5,tokens=24"  # whose scores take several passes
FIELDS = {
    "data.source": STRUCTURE,
    "data.sequence_length": 25,
    "model.vocab_size": 40,
    "model.depth": 1,
    "train.steps": 6,
    "train.eval_rows": 11,  # the last batch is not full
    "train.eval_every": 3,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "optimizer.epsilon": 1e-3,  # the sign of a gradient near 0 is rounding error
    "optimizer.warmup_steps": 1,
    "train.writers": "",
}
# What tells apart the runs of a tuning round, or of a point: rates and seeds; here lengths as well.
OWN = (
    {"optimizer.learning_rate": 0.02, "train.init_seed": 1, "train.data_seed": 2},
    {"optimizer.learning_rate": 0.05, "train.init_seed": 3, "train.data_seed": 4, "train.steps": 5},
    {"optimizer.learning_rate": 1e30, "optimizer.schedule": "constant"},
)
# Measured: 3e-7 of the losses and 1e-6 of the largest number of a parameter, in float32 after 6 steps.
TOLERANCE = 1e-5


def configs(**fields):
    return [tiny_config(**{**FIELDS, **own, **fields}) for own in OWN]


def mesh_of(*sizes):
    sizes = sizes or (1, 1, 1)
    devices = jax.devices()[: int(np.prod(sizes))]
    return partition.make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), devices)


def trial(config, workdir, say=lambda _: None):
    workdir.mkdir(parents=True, exist_ok=True)
    return Trial(config, data.prepare(config.data, config.model.vocab_size), workdir, say)


def together(configs, workdir, mesh, places=(0, 1, 2), say=lambda _: None):
    asked = {at: trial(configs[at], workdir / str(at), say) for at in places}
    return train_together(asked, len(configs), mesh)


def log(workdir):
    """The log without times, and without where it was saved, by step, kind and name."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], line["kind"], name): value
        for line in lines
        for name, value in line.items()
        # None: what does not apply to the data, or was not finite
        if line["kind"] != "save" and name not in ("kind", "train_s", "sha256") and value is not None
    }


def last_state(config, workdir):
    """Step and state of the newest checkpoint, by the shapes of a run alone."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    step, state = checkpoints.restore_latest(make_programs(config, mesh_of()).state)
    checkpoints.close()
    return step, jax.device_get(state)


def assert_same_within_rounding(config, workdir, alone, outcome, other):
    assert (outcome.status, outcome.steps) == (other.status, other.steps)
    assert log(workdir) == pytest.approx(log(alone), rel=TOLERANCE, abs=TOLERANCE)
    (step, state), (expected_step, expected) = (last_state(config, at) for at in (workdir, alone))
    assert step == expected_step == config.train.steps
    assert_trees_close(state, expected, TOLERANCE)
    assert outcome.measures.keys() == other.measures.keys()


@pytest.mark.slow
def test_in_company_a_run_is_what_it_is_alone_and_one_that_diverges_touches_no_other(tmp_path):
    given, mesh, said = configs(), mesh_of(), []
    outcomes = together(given, tmp_path / "together", mesh, say=said.append)
    assert [outcomes[at].status for at in range(3)] == ["finished", "finished", "diverged"]
    assert "loss is not finite at step " in outcomes[2].error
    assert {outcome.trials for outcome in outcomes.values()} == {3}
    assert any(line.startswith("step 5/5  held-out loss") for line in said)
    for at in (0, 1):
        alone = tmp_path / f"alone-{at}"
        alone.mkdir()
        prepared = data.prepare(given[at].data, 40)
        other = train(given[at], prepared, mesh, alone, lambda _: None)
        assert_same_within_rounding(given[at], tmp_path / f"together/{at}", alone, outcomes[at], other)
    # Without the one that diverges: bit for bit the same.
    together(given, tmp_path / "without", mesh, places=(0, 1))
    for at in (0, 1):
        here, there = (tmp_path / name / str(at) for name in ("without", "together"))
        assert log(here) == log(there)
        assert_trees_close(last_state(given[at], here)[1], last_state(given[at], there)[1], 0)


@pytest.mark.slow
def test_interrupted_or_killed_while_some_had_saved_all_resume_bit_for_bit(tmp_path):
    given, mesh = configs(), mesh_of()
    given[2] = dataclasses.replace(given[0], train=dataclasses.replace(given[0].train, data_seed=7))
    straight = together(given, tmp_path / "straight", mesh)

    def stop(line):
        if line.startswith("step 4/6  loss"):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = tmp_path / "stopped"
    with pytest.raises(Preempted, match=r"after step 5; a checkpoint was saved"):
        together(given, stopped, mesh, say=stop)
    # A kill in the middle of the saves leaves runs at different steps: 4 here, 2 or nothing, 5.
    shutil.rmtree(stopped / "0/checkpoints/5")
    shutil.rmtree(stopped / "2/checkpoints")
    resumed = together(given, stopped, mesh)
    for at in range(3):
        times = dict.fromkeys(("train_s", "wall_s", "compile_s"), 0.0)
        one, other = (dataclasses.replace(outcomes[at], **times) for outcomes in (resumed, straight))
        assert one == other
        assert log(stopped / str(at)) == log(tmp_path / "straight" / str(at))
        states = [last_state(given[at], folder / str(at)) for folder in (stopped, tmp_path / "straight")]
        assert states[0][0] == states[1][0]
        assert_trees_close(states[0][1], states[1][1], 0)


@pytest.mark.slow
def test_with_a_teacher_all_learn_from_one_copy(tmp_path, monkeypatch):
    given = [
        tiny_config(**{**FIELDS, **own, "train.teacher": str(tmp_path / "teacher"), "mesh.data": 8})
        for own in OWN[:2]
    ]
    of_teacher = dataclasses.replace(given[0], train=dataclasses.replace(given[0].train, teacher=""))
    asked = functools.partial(describe, metric="loss")
    runs.run(of_teacher, tmp_path / "teacher", asked)
    alone = runs.run(given[0], tmp_path / "alone", asked)
    both = {at: runs.Asked(config, tmp_path / str(at), asked) for at, config in enumerate(given)}
    records = runs.run_together(both, 2)
    assert records[0].teacher == alone.teacher
    assert records[0].final["loss"] == pytest.approx(alone.final["loss"], rel=TOLERANCE)
    assert (records[0].trials_together, alone.trials_together) == (2, None)
    assert {path.name for path in (tmp_path / "1").iterdir()} == {
        p.name for p in (tmp_path / "alone").iterdir()
    }

    def trained_further(config, workdir, mesh):
        found = open_teacher(config, workdir, mesh)
        return dataclasses.replace(found, lineage={**found.lineage, "step": 5000 + int(workdir.name)})

    monkeypatch.setattr(runs, "open_teacher", trained_further)
    later = {at: runs.Asked(config, tmp_path / str(at + 2), asked) for at, config in enumerate(given)}
    with pytest.raises(
        UserError, match=r"^train\.teacher: the 2 runs .* \(step 5,002, step 5,003\); train them"
    ):
        runs.run_together(later, 2)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"model.width": 32}, {}, r"^model\.width: 32 in one run and 24 in another of one program"),
        ({"train.batch_size": 16}, {}, r"^train\.batch_size: 16 in one run and 8"),
        ({"train.teacher": "here"}, {}, r"^train\.teacher: 'here' in one run and ''"),
        (
            {"data.source": "bundled"},
            {"data.source": STRUCTURE, "train.eval_rows": 8},
            r"^data\.has_answers: False in one run",
        ),
        (
            {"model.sharing": "immediate", "model.num_repeats": 2, "train.loops": "1..2"},
            {
                "model.sharing": "immediate",
                "model.num_repeats": 2,
                "train.loops": "1..2",
                "train.data_seed": 1,
            },
            r"^train\.loops: '1\.\.2' draws a number of loops for each step",
        ),
    ],
    ids=["width", "batch", "teacher", "data", "loops"],
)
def test_runs_of_different_programs_are_refused_before_anything_is_written(tmp_path, one, other, message):
    asked = {
        at: runs.Asked(tiny_config(**fields), tmp_path / str(at), describe)
        for at, fields in enumerate((one, other))
    }
    with pytest.raises(UserError, match=message):
        runs.run_together(asked, 2)
    assert not list(tmp_path.iterdir())


def test_more_runs_than_fit_into_memory_are_refused_with_the_number_that_would(tmp_path, monkeypatch):
    point = points(write_study(tmp_path))[0]
    one, each = memory_bytes(point), memory_bytes(point, 2) - memory_bytes(point)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(memory, "device_bytes", lambda: one + 5 * each)
    assert trials.trials_of(point, 6) == 6
    with pytest.raises(UserError, match=r"^--trials_per_program=7: 'none' needs about .*; use at most 6$"):
        trials.trials_of(point, 7)
    with pytest.raises(UserError, match=r"use at most 3$"):
        trials.trials_of(point, 6, jobs=2)
    assert trials.trials_of(point, None) == 1  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert trials.trials_of(point, None, jobs=2) == int(0.8 * (one + 5 * each) - one) // each + 1
    monkeypatch.setattr(memory, "device_bytes", lambda: one // 2)
    assert trials.trials_of(point, None) == 1
    monkeypatch.setattr(memory, "device_bytes", lambda: None)
    assert (trials.trials_of(point, None), trials.trials_of(point, 100)) == (1, 100)
    config = dataclasses.replace(
        point.config,
        model=dataclasses.replace(point.config.model, sharing="immediate", num_repeats=2),
        train=dataclasses.replace(point.config.train, loops="1..2"),
    )
    with pytest.raises(UserError, match=r"^--trials_per_program=2: 'none' draws its numbers of loops"):
        trials.trials_of(dataclasses.replace(point, config=config), 2)


def test_the_compiler_has_the_last_word_on_memory(monkeypatch):
    step = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((10**9,), jax.numpy.float32)).compile()
    monkeypatch.setattr(memory, "device_bytes", lambda: 3 * 10**9)
    message = r"^a training step of 6 runs in one program needs 8\.0 GB .* only 3\.0 GB .*take at most 2 at"
    with pytest.raises(UserError, match=message):
        memory.check_fits(step, tiny_config(), 6)


@pytest.mark.parametrize(
    ("runs", "most", "sizes"), [(6, 4, [3, 3]), (5, 4, [3, 2]), (6, 8, [6]), (2, 1, [1, 1]), (0, 4, [])]
)
def test_parts_are_alike(runs, most, sizes):
    found = list(trials.parts([object() for _ in range(runs)], most))
    assert [len(part) for part, _ in found] == sizes
    assert len({count for _, count in found} | {max(sizes, default=0)}) <= 1 or not sizes
    assert all(list(part) == list(range(len(part))) for part, _ in found)


def tuned_study(folder):
    study = write_study(folder)
    study.write_text(study.read_text().replace("learning_rates=()", "learning_rates=(2**-9, 2**-7)"))
    return study


def test_the_grid_and_the_seeds_train_together_and_the_search_goes_on_alone(tmp_path, monkeypatch):
    alone, parts_ = losses(lambda octave: 3 + (octave + 4) ** 2), []

    def run_together(asked, count):
        parts_.append((len(asked), count))
        return {at: alone(a.config, a.workdir, a.describe, a.say) for at, a in asked.items()}

    monkeypatch.setattr(sweeping, "run", alone)
    monkeypatch.setattr(sweeping, "run_together", run_together)
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    chosen = points(tuned_study(tmp_path), only=["none"])
    assert sweeping.sweep(chosen, tmp_path / "alone", jobs=1) == 0
    assert parts_ == []
    assert sweeping.sweep(chosen, tmp_path / "w", jobs=1, trials=4) == 0
    assert parts_ == [(2, 2), (2, 2)]
    # What has a record is not done again, and keeps its place.
    (tmp_path / "w/results/mini/tiny/none-s0.json").unlink()
    assert sweeping.sweep(chosen, tmp_path / "w", jobs=1, trials=4) == 0
    assert parts_[2:] == [(1, 2)]
    both = [
        {(r.phase, r.seed, r.learning_rate, r.loss) for r in read_records(tmp_path / name / "results")}
        for name in ("alone", "w")
    ]
    assert both[0] == both[1]


def test_one_that_fails_in_company_fails_all_and_they_are_tried_again(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    monkeypatch.setattr(sweeping, "run_together", broken)
    chosen = points(write_study(tmp_path), only=["none"])
    sweeping.sweep(chosen, tmp_path, jobs=1, trials=2)
    records = read_records(tmp_path / "results")
    assert [(r.seed, r.error) for r in records] == [
        (0, "RuntimeError: out of memory"),
        (1, "RuntimeError: out of memory"),
    ]
    alone = losses(lambda _: 3.0)
    done = lambda asked, _: {at: alone(a.config, a.workdir, a.describe, a.say) for at, a in asked.items()}  # noqa: E731
    monkeypatch.setattr(sweeping, "run_together", done)
    sweeping.sweep(chosen, tmp_path, jobs=1, trials=2)
    assert {record.status for record in read_records(tmp_path / "results")} == {"finished"}


@pytest.mark.slow
def test_a_sweep_in_company_ends_with_the_verdicts_of_one_alone(tmp_path):
    flags = [f"--config={tuned_study(tmp_path)}", "--config.train.steps=20"]
    found = {}
    for count in (1, 4):
        workdir = tmp_path / str(count)
        done = command(
            "experiments.sweep",
            f"--workdir={workdir}",
            f"--trials_per_program={count}",
            *flags,
            env={"HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"},
        )
        assert done.returncode == 0, done.stderr
        found[count] = read_records(workdir / "results")
    alone, company = ([r for r in found[count] if r.phase == "comparison"] for count in (1, 4))
    assert [(r.point, r.seed) for r in alone] == [(r.point, r.seed) for r in company]
    assert {r.trials_together for r in found[1]} == {None}
    assert {r.trials_together for r in company} == {2}
    assert {r.trials_together for r in found[4] if r.phase == "tuning"} >= {2}
    grid = [2**-9, 2**-7]
    for a, b in zip(
        *([r for r in found[c] if r.phase == "tuning" and r.learning_rate in grid] for c in (1, 4)),
        strict=True,
    ):
        assert (a.point, a.learning_rate) == (b.point, b.learning_rate)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
    alone, company = (
        [(c.point, c.other, c.word) for c in study_of(found[count]).verdict.comparisons] for count in (1, 4)
    )
    assert alone == company
    assert [pair[:2] for pair in alone] == [("reverse", "none")]


@pytest.mark.slow
def test_a_sweep_in_company_that_is_killed_resumes_bit_for_bit(tmp_path):
    """SIGKILL for all of its processes, three times."""
    flags = [f"--config={write_study(tmp_path)}", "--jobs=1", "--trials_per_program=2", "--lines_every=0"]
    flags += [f"--config.train.{field}" for field in ("steps=60", "checkpoint_every=7", "log_every=5")]
    environment = {**os.environ, "HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}

    def sweep(workdir, stop_at=None):
        asked = [sys.executable, "-m", "experiments.sweep", f"--workdir={tmp_path / workdir}", *flags]
        pipes = {"stdout": PIPE, "text": True}
        with subprocess.Popen(asked, env=environment, start_new_session=True, **pipes) as process:
            seen = ""
            for line in process.stdout:
                seen += line
                if stop_at is not None and stop_at in line:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        return seen

    sweep("alone")
    for stop_at in ("none-s1  step 15/60", "none-s0  step 40/60", "reverse-s1  step 30/60"):
        assert stop_at in sweep("killed", stop_at)
    assert "reverse-s0  resuming after step 2" in sweep("killed")  # 28, or 21 where the kill met the save
    alone, killed = (read_records(tmp_path / workdir / "results") for workdir in ("alone", "killed"))
    assert [r.trials_together for r in alone] == [2] * 4
    for one, other in zip(alone, killed, strict=True):
        for field in ("point", "seed", "status", "steps", "final", "evaluations", "train_curve"):
            assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5"])
def test_a_number_of_trials_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(trials_per_program=value))
    message = rf"^--trials_per_program={value}: expected auto, or a number of at least 1$"
    with pytest.raises(UserError, match=message):
        flags.asked_trials()
