"""Bad flags and files: one line on stderr, exit status 2, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command

from experiments import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import files


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config=configs/depht_vs_width.py", "did you mean configs/depth_vs_width.py"),
        ("--config=configs/layer_sharing.py:huge", "valid presets: tiny, small, paper_125m, paper_350m"),
        ("--config=configs/__init__.py", "has no get_config"),
        ("--config=README.md", "not a Python file"),
        ("--config.model.wdith=3", "no field 'wdith'; did you mean width"),
        ("--config.modle.width=3", "no field 'modle'; did you mean model"),
        ("--config.model.width.x=3", "holds a value, not a group"),
        ("--noconfig.model.share=3", "no field 'share'; did you mean"),
    ],
)
def test_bad_config_flags_are_found_before_flags_are_parsed(flag, message):
    with pytest.raises(UserError, match=message):
        cli.config_first(["sweep", flag], "configs/base.py")


def test_the_config_goes_in_front_of_its_overrides():
    argv = ["train", "--config.model.width=3", "--config", "configs/mobilellm.py:125m", "--workdir=x"]
    expected = ["train", "--config=configs/mobilellm.py:125m", "--config.model.width=3", "--workdir=x"]
    assert cli.config_first(argv, "configs/base.py") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--config.model.width=wide"], "invalid literal for int() with base 10: 'wide'"),
        (["sweep", "--confg=x"], "Unknown command line flag 'confg'. Did you mean: config"),
        (["train", "extra", "--workdir=x"], "unexpected argument 'extra'"),
        (["train"], "--workdir: missing; name the directory"),
        (
            ["train", "--config=configs/tour.py:tiny", "--workdir=x"],
            "--config=configs/tour.py:tiny: names 2 studies, and this command takes one config; use "
            "--config=configs/depth_vs_width.py:tiny or --config=configs/layer_sharing.py:tiny, or",
        ),
    ],
    ids=str,
)
def test_commands_end_with_one_line_and_status_2(arguments, message):
    result = command(f"experiments.{arguments[0]}", *arguments[1:])
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_directory_may_begin_with_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.directory("workdir", "~/runs") == files.local_directory("workdir", "~/runs")
    assert cli.directory("workdir", "~/runs") == tmp_path / "runs"
    assert cli.directory("workdir", "a/~/b") == Path("a/~/b")


def test_a_platform_that_is_not_there_is_one_line():
    program = "import jax; from experiments import cli; cli.run(lambda: jax.device_count())"
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert result.stderr.startswith("error: JAX_PLATFORMS=nowhere: JAX finds no such device")


@pytest.mark.parametrize("error", [AssertionError("mine"), RuntimeError("mine")])
def test_other_errors_of_the_same_kind_keep_their_traceback(error, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def fail():
        raise error

    monkeypatch.setattr(cli.app, "run", lambda *_, **__: fail())  # the flags of this process are pytest's
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(cli.signals, "watch", lambda: None)
    monkeypatch.setattr(cli.quiet, "settings", lambda: None)
    with pytest.raises(type(error), match="mine"):
        cli.run(lambda: 0)


def test_help_is_no_error():
    result = command("experiments.sweep", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for flag in ("--workdir:", "--config:"):
        assert flag in result.stdout


def test_list_and_a_closed_pipe():
    listing = f"{sys.executable} -m experiments.sweep --config=configs/depth_vs_width.py:paper_125m --list"
    result = subprocess.run(["bash", "-c", f"{listing} | head -2"], capture_output=True, text=True)
    assert result.stderr == ""
    assert "163,184,640" in result.stdout
