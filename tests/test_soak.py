"""The short form of `python -m experiments.soak`."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_goes_unseen():
    """Eight kills, which meet all four moments, and six bits in each kind of file."""
    command = [sys.executable, "-m", "experiments.soak", "--kills=8", "--flips=6"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kills = re.search(r"kills, then the same as without: (\d+) of \1 \((.*)\)", result.stdout)
    assert kills, result.stdout
    moments = {text.partition(" ")[2] for text in kills[2].split(", ")}
    assert moments == {"in the start", "in a step", "in a save", "in an evaluation"}
    assert result.stdout.count("noticed") == result.stdout.count(": 6 of 6") == 6
