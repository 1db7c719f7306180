"""A run's directory belongs to one config, from the first checkpoint on; records say where they were made."""

import json
import os
import platform
from pathlib import Path

import pytest
from conftest import tiny_config

from mobilellm_jax import run
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.errors import UserError


def test_a_config_that_never_trained_can_be_mended(tmp_path):
    run.claim_workdir(tmp_path, tiny_config(**{"data.source": "files:typo.txt"}))
    config = tiny_config(**{"data.source": "files:text.txt"})
    run.claim_workdir(tmp_path, config)
    assert from_config_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_a_config_with_a_checkpoint_stands(tmp_path):
    run.claim_workdir(tmp_path, tiny_config())
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    run.claim_workdir(tmp_path, tiny_config(**{"mesh.fsdp": 2, "train.log_every": 3}))
    with pytest.raises(UserError, match=r"model\.width is 24 there and 32 here.*another --workdir"):
        run.claim_workdir(tmp_path, tiny_config(**{"model.width": 32}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not the config of a run"):
        run.claim_workdir(tmp_path, tiny_config())
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: is missing"):
        run.claim_workdir(tmp_path, tiny_config())


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file/w: cannot write there \(Not a directory\)"):
        run.claim_workdir(tmp_path / "file" / "w", tiny_config())


def test_a_curve_is_thinned_to_its_last_point():
    assert run.thin(list(range(10)), 4) == [0, 3, 6, 9]
    assert run.thin([1, 2], 4) == [1, 2]


def test_the_record_names_the_processor():
    device = run.device()
    assert device["platform"] == "cpu"
    assert device["kind"] in Path("/proc/cpuinfo").read_text() + platform.machine()
    assert (device["count"], device["cores"]) == (8, len(os.sched_getaffinity(0)))
