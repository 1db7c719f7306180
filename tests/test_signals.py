"""Signals in commands: none is lost, wherever the main thread is, and none ends in a crash."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mobilellm_jax.training.signals import RESUME_ME

AGAIN = "Run the same command again; what was saved is kept\n"
# Each says that it is ready, and holds a lease and a line that is not flushed where it has one.
IN_C = """
import ctypes, sys
from experiments import cli
from experiments.runner.leases import Leases

def main():
    Leases("{}").take(["point"])
    print("a line")
    print("ready", file=sys.stderr, flush=True)
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # never returns, and runs no handler of Python, as XLA does for seconds
"""
IN_GARBAGE_COLLECTION = """
import gc, sys, time
from experiments import cli

def main():
    gc.callbacks.append(lambda *_: time.sleep(1))  # an exception that is raised here is ignored
    print("ready", file=sys.stderr, flush=True)
    while True:
        gc.collect()
"""
IN_A_LOOP = """
import sys, time
from experiments import cli
from mobilellm_jax.training import signals

def main():
    with signals.noted_signals() as received:
        print("ready", file=sys.stderr, flush=True)
        while not received:
            time.sleep(0.01)
        print("noted", file=sys.stderr, flush=True)
        sys.stdin.readline()  # a save
    raise signals.stopped(received, "after a save")
"""


@contextlib.contextmanager
def running(*command: object) -> Iterator[subprocess.Popen]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def started(program: str) -> contextlib.AbstractContextManager[subprocess.Popen]:
    return running("-c", f"{program}\ncli.run(main)")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_that_is_in_c(number, status, tmp_path):
    """And releases what it holds."""
    with started(IN_C.format(tmp_path)) as process:
        assert process.stderr.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (status, "a line\n"), errors
    assert errors == f"stopped by {number.name} with nothing to save. {AGAIN}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_signal_during_garbage_collection_is_not_lost(number, status):
    with started(IN_GARBAGE_COLLECTION) as process:
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (status, f"stopped by {number.name} with nothing to save. {AGAIN}")


def test_a_loop_notes_the_first_signal_and_only_a_second_ctrl_c_cuts_its_save_short():
    for number, status, last in (
        (signal.SIGTERM, RESUME_ME, "after a save"),
        (signal.SIGINT, 130, "at once"),
    ):
        with started(IN_A_LOOP) as process:
            assert process.stderr.readline() == "ready\n"
            process.send_signal(number)
            assert process.stderr.readline() == "noted\n"
            process.send_signal(number)
            if number == signal.SIGTERM:
                process.stdin.write("\n")
            else:
                process.wait(timeout=20)
            _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (status, f"stopped by {number.name} {last}. {AGAIN}")


def test_a_signal_while_a_command_imports_ends_it_with_one_line():
    with running("-X", "importtime", "-m", "experiments.train") as process:
        for line in process.stderr:
            if line.endswith(" jax._src.config\n"):  # of many more
                break
        process.send_signal(signal.SIGTERM)
        lines = process.communicate(timeout=20)[1].splitlines(keepends=True)
    assert process.returncode == 75
    told = [line for line in lines if not line.startswith("import time:")]
    assert told == [f"stopped by SIGTERM while importing; nothing to save. {AGAIN}"]


def test_a_command_leaves_ignored_signals_ignored_and_an_import_leaves_all_as_they_are():
    program = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import experiments
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
from experiments import cli
cli.run(lambda: signal.raise_signal(signal.SIGHUP))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_xla_compiles_ends_the_training_with_one_line(number, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    monkeypatch.delenv("XLA_FLAGS")  # those of the tests compile fast
    with running("-m", "experiments.train", f"--workdir={tmp_path}/run") as process:
        assert any("Compiling jit(step)" in line for line in process.stderr)
        process.send_signal(number)
        *_, last = process.communicate(timeout=20)[1].splitlines(keepends=True)
    assert process.returncode == (130 if number == signal.SIGINT else 75)
    assert re.fullmatch(rf"stopped by {number.name} (while \w+; |with )nothing to save\. {AGAIN}", last)
    assert not list((tmp_path / "run/.leases").iterdir())


@pytest.mark.slow
def test_a_signal_to_one_of_several_processes_is_not_taken_by_jax():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = f"""
import sys, time
from experiments import cli
from mobilellm_jax.parallel import processes

def main():
    processes.start("{address}", 1, 0, 60, "")
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
"""
    with started(program) as process:
        assert "ready\n" in iter(process.stderr.readline, "")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[1] == f"stopped by SIGTERM with nothing to save. {AGAIN}"
    assert process.returncode == os.EX_TEMPFAIL


def test_a_process_of_a_sweep_that_is_killed_ends_while_it_imports():
    """Its parent, which is no more, is not the one that it was started by."""
    program = "import os; os.environ['MOBILELLM_JAX_PARENT'] = '1'; import experiments, time; time.sleep(60)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20)
    assert (result.returncode, result.stderr) == (-signal.SIGTERM, b"")
