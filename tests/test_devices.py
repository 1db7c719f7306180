"""A run on each device of a host: what each process gets to see, and what is refused."""

import importlib.metadata
import importlib.util

import pytest
from commands import command
from test_sweep import points, write_study

from experiments.runner import devices, sweeping
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.errors import UserError


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)


def start(study, workdir, *flags, platforms="cpu"):
    """Runs a sweep on a host with four simulated devices."""
    environment = {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": platforms}
    return command("experiments.sweep", f"--config={study}", f"--workdir={workdir}", *flags, env=environment)


@pytest.mark.slow  # 15 s; test_sweep stops such a sweep, and the groups are tested below
def test_each_run_has_its_part_of_the_devices(study, tmp_path):
    result = start(study, tmp_path / "w", "--seeds=1", "--devices_per_run=2")
    assert result.returncode == 0, result.stderr
    assert "2 points at a time, each on 2 of the devices of this host" in result.stdout
    records = read_records(tmp_path / "w/results")
    assert [(record.status, record.device["count"]) for record in records] == [("finished", 2)] * 2


@pytest.mark.slow
def test_a_process_that_sees_other_devices_than_its_own_does_not_start(study, tmp_path):
    environments = [{"JAX_NUM_CPU_DEVICES": "8"}, {"JAX_NUM_CPU_DEVICES": "3"}]  # 8 as here: right
    with pytest.raises(UserError, match=r"the process of mini/tiny/none \(status 1\) ended early"):
        sweeping.sweep(points(study, seeds=1), tmp_path / "w", groups=environments)
    records = read_records(tmp_path / "w/results")
    assert [(record.point, record.device["count"]) for record in records] == [("reverse", 8)]


def test_groups_of_gpus_are_parts_of_those_that_are_visible():
    visible = "CUDA_VISIBLE_DEVICES"
    assert devices.groups("gpu", 3, 1, {}) == [{visible: "0"}, {visible: "1"}, {visible: "2"}]
    assert devices.groups("gpu", 4, 2, {visible: "5,1, 7,GPU-8a"}) == [
        {visible: "5,1"},
        {visible: "7,GPU-8a"},
    ]


def test_groups_of_tpu_chips_are_slices_of_their_own():
    groups = devices.groups("tpu", 8, 4, {})
    assert [group["TPU_VISIBLE_CHIPS"] for group in groups] == ["0,1,2,3", "4,5,6,7"]
    assert {group["TPU_CHIPS_PER_PROCESS_BOUNDS"] for group in groups} == {"2,2,1"}
    assert {group["TPU_PROCESS_BOUNDS"] for group in groups} == {"1,1,1"}
    ports = [group["TPU_PROCESS_PORT"] for group in groups]
    assert [group["TPU_PROCESS_ADDRESSES"] for group in groups] == [f"localhost:{port}" for port in ports]
    assert len(set(ports)) == 2
    given = devices.groups("tpu", 2, 1, {"TPU_VISIBLE_CHIPS": "2,3"})
    assert [group["TPU_VISIBLE_CHIPS"] for group in given] == ["2", "3"]


@pytest.mark.parametrize(
    ("platform", "count", "size", "message"),
    [
        ("cpu", 4, 3, "this host has 4 cpu devices; valid: 1, 2, 4"),
        ("gpu", 1, 2, "this host has 1 gpu device; valid: 1"),
        ("tpu", 6, 3, "this host has 6 tpu chips; valid: 1, 2"),
    ],
)
def test_groups_that_do_not_fit(platform, count, size, message):
    with pytest.raises(UserError, match=f"--devices_per_run={size}: {message}$"):
        devices.groups(platform, count, size, {})


@pytest.mark.parametrize(
    ("flags", "platforms", "message"),
    [
        (["--devices_per_run=8"], "cpu", "this host has 4 cpu devices; valid: 1, 2, 4"),
        (["--devices_per_run=1"], "cuda", "--devices_per_run: jax finds no devices on this host ("),
        (["--devices_per_run=1", "--jobs=1"], "cpu", "cannot be combined with --jobs or --distributed"),
        (["--devices_per_run=1", "--process_id=0"], "cpu", "cannot be combined with --jobs or --distributed"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(study, tmp_path, flags, platforms, message):
    result = start(study, tmp_path / "w", *flags, platforms=platforms)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert message in result.stderr
    assert not (tmp_path / "w").exists()


def test_a_host_that_can_have_no_accelerator_is_not_asked(monkeypatch):
    """Looking takes a process that imports jax."""
    platform = devices.platform.__wrapped__
    monkeypatch.setattr(devices, "of_host", lambda: ("tpu", 4))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    for asked, found in ((None, "cpu"), ("cpu", "cpu"), ("tpu", "tpu"), ("tpu,cpu", "tpu")):
        monkeypatch.setenv("JAX_PLATFORMS", asked or "")
        assert platform() == found
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ["xla_cuda13"])
    assert platform() == "tpu"
