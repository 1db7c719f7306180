"""Writers of metrics: services get the numbers of metrics.jsonl, and no error of theirs ends a training."""

import json
import sys
import time
import types

import jax.numpy as jnp
import pytest
from conftest import tiny_config

from mobilellm_jax.config import from_config_dict, to_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs import run
from mobilellm_jax.storage import writers
from mobilellm_jax.training.held_out import Scores
from mobilellm_jax.training.progress import Progress


class FakeRun:
    """A run of a service that fails, or hangs, in the call named."""

    def __init__(self, fails, hangs, arguments):
        self.fails, self.hangs, self.arguments, self.logged, self.is_over = fails, hangs, arguments, [], False

    def log(self, values, step):
        if self.fails == "log":
            raise ConnectionError("no route to host")
        self.logged.append({"step": step, **values})

    def finish(self):
        if self.fails == "finish":
            raise ConnectionError("no route to host")
        if self.hangs:
            time.sleep(60)
        self.is_over = True


@pytest.fixture
def install(monkeypatch):
    """Puts a fake package where it would be imported from; gives the runs it will have."""

    def put(name, fails="", hangs=False):
        runs = []

        def init(**arguments):
            if fails == "init":
                raise RuntimeError("api_key not configured\nsee the page")
            runs.append(FakeRun(fails, hangs, arguments))
            return runs[-1]

        module = types.ModuleType(name)
        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
        return runs

    return put


def train(workdir, names, start=0, stop=4):
    """Logs steps `start` + 1 to `stop` as a training does; gives the lines said."""
    said = []
    config = tiny_config(**{"train.writers": names, "train.log_every": 1})
    progress = Progress(config, workdir, start, said.append)
    for step in range(start + 1, stop + 1):
        progress.stepped(
            step, 0.1 * step, {"loss": jnp.float32(5 - step), "grad_norm": jnp.float32(0.5 * step)}
        )
    progress.catch_up()
    progress.evaluated(Scores(loss=1.5, bits_per_byte=2.0, error=None))
    progress.before_save()
    progress.close()
    return said


def numbers(workdir):
    """What a service should have got by metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"]}
        | {
            f"{line['kind']}/{name}": value
            for name, value in line.items()
            if name not in ("kind", "step", "train_s", "sha256") and value is not None
        }
        for line in lines
        if line["kind"] != "save"
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_the_numbers_of_the_log(tmp_path, install, name, monkeypatch):
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    runs = install(name)
    said = train(tmp_path, f"tensorboard,{name}")
    (run,) = runs
    assert run.logged == numbers(tmp_path)
    assert len(run.logged) == 5
    assert run.is_over
    assert run.arguments["config"]["train"]["writers"] == f"tensorboard,{name}"
    assert run.arguments["project"] == "mobilellm_jax"
    assert any((tmp_path / "tensorboard").iterdir())
    assert not any("warning" in line for line in said)


def test_resuming_continues_the_run_and_starting_over_begins_another(tmp_path, install, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    runs = install("wandb")
    train(tmp_path, "wandb")
    train(tmp_path, "wandb", start=4, stop=6)
    train(tmp_path, "wandb")
    first, resumed, again = (run.arguments for run in runs)
    assert first["id"] == resumed["id"] != again["id"]
    assert first["name"] == resumed["name"] == f"{tmp_path.name}-{first['id']}"
    assert first["resume"] == "allow"
    assert {run["project"] for run in (first, resumed, again)} == {"mine"}
    assert [line["step"] for line in runs[1].logged] == [5, 6, 6]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failing_service_is_named_once_and_the_training_goes_on(tmp_path, install, fails):
    install("wandb", fails=fails)
    said = train(tmp_path, "wandb")
    (warning,) = [line for line in said if "wandb" in line]
    reason = "RuntimeError: api_key not configured" if fails == "init" else "no route to host"
    assert warning.startswith("warning: wandb failed (")
    assert reason in warning
    assert "\n" not in warning
    assert len(numbers(tmp_path)) == 5


def test_a_service_that_hangs_is_left_behind(tmp_path, install, monkeypatch):
    monkeypatch.setattr(writers, "_END_S", 0.05)
    install("trackio", hangs=True)
    start = time.monotonic()
    said = train(tmp_path, "trackio")
    assert time.monotonic() - start < 30
    assert said[-1].startswith("warning: trackio has not sent everything")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"train\.writers: '{name}' needs .*pip install -e '\.\[{name}\]'"):
        run.run(tiny_config(**{"train.writers": name}), tmp_path / "run", lambda **_: None)
    assert not (tmp_path / "run").exists()


def test_an_id_that_is_damaged_is_replaced(tmp_path, install):
    runs = install("trackio")
    train(tmp_path, "trackio")
    (tmp_path / writers.ID).write_text('{"id": "x"}')
    train(tmp_path, "trackio", start=4, stop=5)
    assert runs[0].arguments["name"] != runs[1].arguments["name"] != f"{tmp_path.name}-x"
    assert "id" not in runs[0].arguments


def test_a_config_older_than_the_field_has_tensorboard():
    values = to_dict(tiny_config())
    del values["train"]["writers"]
    assert from_config_dict(values) == tiny_config()
