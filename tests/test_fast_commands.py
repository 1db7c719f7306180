"""A forked command is like a real one: status, streams, environment, path, signals."""

import json
import os
import select
import signal
import subprocess
import sys

import pytest
from commands import command, start

PROBE = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path,
    "cwd": os.getcwd(), "env": dict(os.environ),
    "stdin": sys.stdin.read(), "main": sys.modules["__main__"].__spec__.name, "names": sorted(globals()),
    "buffering": [sys.stdout.line_buffering, sys.stderr.line_buffering], "flags": str(sys.flags),
    "encodings": [sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors], "warnings": sys.warnoptions,
    "files": sorted(os.listdir("/proc/self/fd")), "group": os.getpgid(0), "session": os.getsid(0),
}))
"""


@pytest.fixture
def module(tmp_path):
    """Writes a module; runs it in its folder."""

    def run(text, *flags, **options):
        (tmp_path / "probe.py").write_text(text)
        return command("probe", *flags, cwd=tmp_path, **options)

    return run


def test_a_fork_finds_what_a_real_process_finds(tmp_path, module, monkeypatch):
    module("")  # starts the template, if it is the first
    monkeypatch.delenv("PATH")
    variables = {"GIVEN": "a=b\nü", "PYTHONPATH": f"sub{os.pathsep}/nowhere"}
    forked = module(PROBE, "--x=1", "y z", env=variables, input="héllo\n")
    line = [sys.executable, "-m", "probe", "--x=1", "y z"]
    real = subprocess.run(
        line,
        cwd=tmp_path,
        env={**os.environ, **variables},
        input="héllo\n",
        text=True,
        capture_output=True,
    )
    assert (forked.returncode, forked.stderr) == (real.returncode, real.stderr) == (0, "")
    ours, theirs = json.loads(forked.stdout), json.loads(real.stdout)
    by_imports = set(ours["env"]) - set(theirs["env"])
    assert by_imports <= {"TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY", "CRC32C_SW_MODE"}
    assert {**ours, "env": {n: v for n, v in ours["env"].items() if n not in by_imports}} == theirs


@pytest.mark.parametrize(
    ("text", "status", "errors"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(2)", 2, ""),
        ("import sys; sys.exit('so it ends')", 1, "so it ends\n"),
        (
            "import atexit; atexit.register(lambda: 1 / 0); raise SystemExit(None)",
            0,
            "ZeroDivisionError",
        ),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT, "\nKeyboardInterrupt\n"),
        ("1 / 0", 1, "\nZeroDivisionError: division by zero\n"),
    ],
)
def test_statuses(module, text, status, errors):
    done = module(text)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert errors in done.stderr
    assert bool(done.stderr) == bool(errors)


def test_a_module_that_is_not_there():
    done = command("experiments.nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{sys.executable}: No module named experiments.nothing\n"


def test_options_of_jax_are_those_of_the_environment(module):
    text = "import jax; print(jax.device_count(), jax.config.jax_enable_x64, jax.config.jax_platforms)"
    variables = {"JAX_NUM_CPU_DEVICES": "3", "JAX_ENABLE_X64": "yes", "JAX_PLATFORMS": "cpu"}
    assert module(text, env=variables).stdout == "3 True cpu\n"
    assert module("import jax; print(jax.config.jax_num_cpu_devices)").stdout == "-1\n"


@pytest.mark.parametrize("name", ["PYTHONHASHSEED", "OMP_NUM_THREADS", "JAX_FORCE_TPU_INIT"])
def test_what_is_read_before_the_fork_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=7: is read before the fork"):
        command("experiments.sweep", env={name: "7"})


def test_a_process_can_be_signalled_until_it_was_waited_for(tmp_path):
    text = "import sys\nprint('ready', flush=True)\nsys.stdin.read()"
    (tmp_path / "probe.py").write_text(text)
    with start("probe", cwd=tmp_path, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert os.getpgid(process.pid) == process.pid
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0)
        os.killpg(process.pid, signal.SIGTERM)
        select.select([process._channel], [], [])  # until it has ended
        os.kill(process.pid, 0)
        assert process.wait() == process.poll() == -signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
        process.kill()
