"""The short form of `python -m experiments.soak`."""

import re
import subprocess
import sys

import pytest

from experiments.soaks import ends


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_goes_unseen():
    """Eight kills and twelve signals, which meet all their moments, and six bits in each kind of file."""
    command = [sys.executable, "-m", "experiments.soak", "--kills=8", "--signals=12", "--flips=6"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for what, moments in (("kills", ends.KILLED), ("signals", ends.SIGNALLED)):
        counted = re.search(rf"{what}.*, then the same as without: (\d+) of \1 \((.*)\)", result.stdout)
        assert counted, result.stdout
        assert {text.partition(" ")[2] for text in counted[2].split(", ")} >= set(moments)
    commands = re.search(r"no lease left: (\d+) of \1 \((.*)\)", result.stdout)
    assert commands, result.stdout
    assert {"sweep --jobs=1", "sweep --jobs=2"} <= {text.split(" ", 2)[2] for text in commands[2].split(", ")}
    assert result.stdout.count("noticed") == result.stdout.count(": 6 of 6") == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", [number.name for number in ends.SIGNALS])
def test_runs_hear_what_the_shell_ignores(name):
    child = f"import signal; print(signal.getsignal(signal.{name}) is signal.SIG_IGN)"
    code = f"""
import signal, subprocess, sys
signal.signal(signal.{name}, signal.SIG_IGN)
from experiments import soak
for hear in (lambda: None, soak.hear_signals):
    hear()
    subprocess.run([sys.executable, "-c", {child!r}])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "False"]
