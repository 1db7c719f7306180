"""The parts of the benchmark about checkpoints, data and meshes, on models so small that they are quick."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.benchmarks.shapes import config_of
from experiments.benchmarks.trainer import Trainer, tiny_config
from mobilellm_jax.costs import accounting


def test_the_model_is_that_of_the_paper():
    config = config_of("125m", 8, 128, False)
    assert accounting.parameters(config.model).total == 124_635_456
    assert accounting.parameters(config_of("125m", 8, 16, True).model).total < 100_000


def test_waiting_for_batches_is_told_from_training():
    trainer = Trainer(tiny_config())

    def slow():
        for rows in trainer.random_batches():
            time.sleep(0.05)
            yield rows

    before = np.asarray(trainer.state.params["embedding"])
    assert trainer.train(slow(), 3) >= 0.15
    assert int(trainer.state.step) == 4  # one to compile
    assert (np.asarray(trainer.state.params["embedding"]) != before).any()


@pytest.mark.slow
def test_the_parts_leave_records(tmp_path):
    parts = ("checkpoints", "input", "sharding")
    command = [sys.executable, "-m", "experiments.bench", "--quick", f"--only={','.join(parts)}"]
    result = subprocess.run([*command, f"--workdir={tmp_path}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = {}
    for part in parts:
        record = json.loads((tmp_path / "bench" / "cpu" / f"{part}.json").read_text())
        assert record["quick"]
        lines |= {line["name"]: line for line in record["lines"]}
    targets = {name: line["at_most"] for name, line in lines.items() if line["at_most"] is not None}
    assert targets == {
        "a save every 100 steps: share of time lost": 5,
        "125M, 1 rows of 64: waiting for data": 1,
    }
    for name in ("verification, share of a restore", "tiny, 8 rows of 64: waiting for data"):
        assert all(0 < value < 100 for value in lines[name]["values"])
    assert all(value > 0 for value in lines["fsdp:8 / 1 device"]["values"])
