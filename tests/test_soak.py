"""The short form of `python -m experiments.soak`."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_goes_unseen():
    """Two kills and six bits in each kind of file."""
    command = [sys.executable, "-m", "experiments.soak", "--kills=2", "--flips=6"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "kills, then the same as without: 2 of 2" in result.stdout
    assert result.stdout.count("noticed") == result.stdout.count(": 6 of 6") == 4
