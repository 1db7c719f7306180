"""Flags, and bad ones: one line on stderr, exit status 2, no traceback. The console command."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command

from experiments import cli
from experiments.runner import studies
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
        (
            ["sweep", "--config.model.width=wide"],
            "--config.model.width=wide: 'wide' is not a whole number in digits",
        ),
        (["sweep", "--confg=x"], "Unknown command line flag 'confg'. Did you mean: config"),
        (["train", "extra", "--workdir=x"], "unexpected argument 'extra'"),
        (["train"], "--workdir: missing; name the directory"),
        (
            ["train", "--config=configs/playground.py:tiny", "--workdir=x"],
            "--config=configs/playground.py:tiny: names 3 studies, and this command takes one config; use "
            "--config=configs/playground.py:structure_tiny or",
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
    for flag in ("--workdir:", "--config:", "--config.model.width=128\n", "--config.train.steps=500\n"):
        assert flag in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 0, "  train      Train one model.\n"),
        (["-h"], 0, "usage: mobilellm <command>"),
        (["--version"], 0, f"mobilellm_jax {importlib.metadata.version('mobilellm_jax')}\n"),
        (["shapes", "-h"], 0, "--budget: "),
        (["sweep", "--config=configs/khop.py:tiny", "--list"], 0, "khop   1 x 48 x none"),
        (["trian"], 2, "error: trian: no such command; did you mean train?\n"),
        (["shapes"], 2, "error: --budget=: expected <name>:<value>"),
    ],
    ids=str,
)
def test_the_console_command_works_in_any_folder(tmp_path, arguments, status, said):
    line = [Path(sys.executable).with_name("mobilellm"), *arguments]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert said in (result.stderr if status else result.stdout)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_the_run_is(tmp_path):
    flags = [f"--workdir={tmp_path}/run", "--config.model.sharing=immediate", "--config.model.num_repeats=2"]
    result = command("experiments.train", "--dry_run", "--config.data.source=files:x", *flags)
    assert result.returncode == 0, result.stderr
    assert "4 blocks, 8 layers, width 128; 1,311,872 parameters, 1,049,728 of them outside" in result.stdout
    assert "500 steps of 16 rows of 256 tokens; 2,048,000 tokens, " in result.stdout
    assert f"{tmp_path}/run (new)" in result.stdout
    assert not list(tmp_path.iterdir())
    result = command("experiments.train", "--dry_run", "--config.mesh.fsdp=3", *flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "mesh: data=-1, fsdp=3" in result.stderr


def test_list_and_a_closed_pipe():
    listing = f"{sys.executable} -m experiments.sweep --config=configs/depth_vs_width.py:paper_125m --list"
    result = subprocess.run(["bash", "-c", f"{listing} | head -2"], capture_output=True, text=True)
    assert result.stderr == ""
    assert "163,184,640" in result.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "    return base.update(base.get_config(), {'model.widht': 8})",
            r'line 4: KeyError: Key "widht" does not .*locked\. Did you mean "width"',
        ),
        ("    return base.get_config().modle", r"line 4: AttributeError: .*modle"),
        ("    return base.get_config(", r"line 4: SyntaxError: '\(' was never closed"),
        ("    raise ValueError('no such size')", "no such size"),
    ],
)
def test_an_error_in_a_config_file_is_one_line_that_names_the_place(tmp_path, line, message):
    path = tmp_path / "mine.py"
    path.write_text(f"from configs import base\n\ndef get_config(preset=''):\n{line}\n")
    with pytest.raises(UserError, match=message) as error:
        cli.load_config(str(path))
    assert str(error.value).startswith(f"--config={path}: ")
    assert "\n" not in str(error.value)


def test_a_study_that_lacks_a_field_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import base\nget_config = base.get_config\n\n\n"
        "def study(preset):\n    return base.Study(question='?')\n\n\ndef sweep(preset):\n    yield {}\n"
    )
    with pytest.raises(UserError, match=rf"--config={path}: .*mine\.py, line 6: TypeError: .*'scientific'"):
        studies.points_of(str(path), {}, None, [])
