"""Several processes on one run, as real processes over localhost: the same numbers, one voice, one end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import SHARING, init, loss_and_gradients, random_batch, random_params, tiny_model
from test_sweep import write_study

from experiments.runner import hosts, sweeping
from experiments.runner.studies import points_of
from mobilellm_jax.analysis.records import read_record, read_records
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition, processes

ENVIRONMENT = {**os.environ, "PYTHONPATH": ".", "JAX_NUM_CPU_DEVICES": "1"}


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(
    commands: list[list[str]], environment: Mapping[str, str] = {}
) -> Iterator[list[subprocess.Popen]]:
    """Yields the processes of the commands, and kills what is left of them."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**ENVIRONMENT, **environment}
    started = [subprocess.Popen([sys.executable, *command], env=env, **pipes) for command in commands]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def on_every_process(count: int, *arguments: object) -> list[list[str]]:
    """Returns a command for each of `count` processes."""
    flags = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={count}"]
    return [["-m", *map(str, arguments), *flags, f"--process_id={i}"] for i in range(count)]


def ends(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Returns exit status, output and errors of each."""
    parts = [(process, *process.communicate(timeout=1500)) for process in started]
    return [(process.returncode, output, errors) for process, output, errors in parts]


def run_all(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    with running(commands) as started:
        return ends(started)


def assert_same_records(actual: Path, expected: Path, pattern: str = "*.json") -> None:
    """All but where, when and how fast; losses within rounding."""
    paths = sorted(expected.rglob(pattern))
    assert paths
    for path in paths:
        one, two = read_record(path), read_record(actual / path.relative_to(expected))
        for name in ("point", "seed", "status", "steps", "tokens_seen", "layer_plan", "parameters", "data"):
            assert getattr(one, name) == getattr(two, name), name
        assert [e["step"] for e in one.evaluations] == [e["step"] for e in two.evaluations]
        losses = [[e["loss"] for e in record.evaluations] for record in (one, two)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
        np.testing.assert_allclose(two.train_curve, one.train_curve, rtol=1e-4)
        assert one.floor == two.floor
        for name in ("by_position", "documents"):
            sums = [
                np.concatenate(list((getattr(record, name) or {"": []}).values())) for record in (one, two)
            ]
            np.testing.assert_allclose(sums[1], sums[0], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_sweep_of_two_processes_leaves_the_records_of_one(study, tmp_path, capsys):
    arguments = [f"--config={study}", f"--workdir={tmp_path}/two", "--seeds=1", "--only=reverse"]
    first, second = run_all(on_every_process(2, "experiments.sweep", *arguments))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "mini/tiny/reverse-s0  finished: loss " in first[1]
    assert second[1] == ""  # one speaks for all
    assert sweeping.sweep(points_of(str(study), {}, 1, ["reverse"]), tmp_path / "one", jobs=1) == 0
    assert_same_records(tmp_path / "two/results", tmp_path / "one/results")
    record = read_record(tmp_path / "two/results/mini/tiny/reverse-s0.json")
    assert (record.device["count"], len(list((tmp_path / "two/results").rglob("*.json")))) == (2, 1)
    log = (tmp_path / "two/runs/mini/tiny/reverse-s0/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]  # of the first process alone
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 4), ("eval", 4), ("save", 4)]


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step_and_the_same_command_goes_on(study, tmp_path):
    run = ["experiments.train", f"--config={study}", "--config.train.checkpoint_every=100000"]
    run += ["--config.train.log_every=1", "--config.train.steps=300", "--config.train.eval_every=300"]
    with running([["-m", *run, f"--workdir={tmp_path}/one/run"]]) as started:
        ((status, _, errors),) = ends(started)
    assert status == 0, errors
    with running(on_every_process(2, *run, f"--workdir={tmp_path}/two/run")) as started:
        for line in started[0].stdout:
            if line.startswith("step 20/"):
                for status, _, errors in run_all(on_every_process(2, *run, f"--workdir={tmp_path}/two/run")):
                    assert status == 2, errors
                    assert f"running there: {socket.gethostname()}-{started[0].pid}-" in errors
                started[1].send_signal(signal.SIGTERM)
                break
        first, second = ends(started)
    assert first[0] == second[0] == 75, first[2] + second[2]
    (step,) = [int(path.name) for path in (tmp_path / "two/run/checkpoints").iterdir()]
    assert f"stopped by another process after step {step}; a checkpoint was saved" in first[2]
    assert f"stopped by SIGTERM after step {step}; a checkpoint was saved" in second[2]
    first, second = run_all(on_every_process(2, *run, f"--workdir={tmp_path}/two/run"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert f"resuming after step {step}" in first[1]
    assert second[1] == ""
    assert_same_records(tmp_path / "two", tmp_path / "one", "record.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, "2,1,1 3;1,2,1 1;1,1,2 2;2,1,1 0;1,1,2 4"),
        (4, "4,1,1 3;1,4,1 3;2,2,1 3;2,1,2 3;1,2,2 3;2,1,2 0;2,1,2 1;2,1,2 2;2,1,2 4"),
    ],
    ids=["two", "four"],
)
def test_loss_gradients_and_initial_parameters_of_several_processes(count, cases, tmp_path):
    """Every sharing strategy with grouped heads, and every kind of mesh; initial parameters bit for bit.

    Not every strategy on every mesh, as each case is compiled in every process.
    """
    out, port = tmp_path / "out.npz", free_port()
    arguments = ["tests/process_gradients.py", str(port), str(count)]
    for status, _, errors in run_all([[*arguments, str(i), str(out), cases] for i in range(count)]):
        assert status == 0, errors
    found = dict(np.load(out))
    pairs = [case.split() for case in cases.split(";")]
    assert {int(place) for _, place in pairs} == set(range(len(SHARING)))
    initialized = set()
    for text, place in pairs:
        case, m = f"{text} {place}", tiny_model(**SHARING[int(place)])
        (nats, _), gradients = loss_and_gradients(random_params(m), *random_batch(m), m)
        np.testing.assert_allclose(found.pop(f"{case} nats"), nats, rtol=1e-6)
        compared = [("gradients", gradients, 1e-5)]
        if text not in initialized:
            compared.append(("initial", init(jax.random.key(0), m), 0))
            initialized.add(text)
        for kind, tree, tolerance in compared:
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                actual, atol = found.pop(f"{case} {kind}/{name}"), tolerance * np.abs(leaf).max()
                np.testing.assert_allclose(actual, leaf, rtol=0, atol=atol, err_msg=f"{case} {name}")
    assert not found


@pytest.mark.slow
def test_four_sweeps_share_the_points_and_take_over_from_one_that_is_killed(study, tmp_path):
    """Every run is trained to its end by exactly one of them."""
    plans = ["0 0 1", "0 1 0", "0 1 1", "1 0 0"]
    text = study.read_text().replace('baseline="none", ', "")
    study.write_text(text.replace('("none", "reverse"), model__num_repeats=(1, 2)', repr(plans)))
    command = ["-m", "experiments.sweep", f"--config={study}", f"--workdir={tmp_path}/w", "--jobs=1"]
    command += ["--seeds=1", "--config.train.steps=60", "--config.train.checkpoint_every=10"]
    command += ["--config.train.log_every=10", "--lines_every=0"]
    with running([command] * 4) as started:
        seen = ""
        for line in started[0].stdout:
            seen += line
            if "step 40/60" in line:  # when step 20 was saved, the save of step 10 was complete
                break
        started[0].kill()
        others = ends(started[1:])
    assert [status for status, _, _ in others] == [0, 0, 0], others
    victim = seen.splitlines()[-1].split("  ")[0]
    output = seen + "".join(output for _, output, _ in others)
    for plan in plans:
        name = f"mini/tiny/{plan.replace(' ', '-')}-s0"
        assert output.count(f"{name}  step 60/60  held-out loss") == 1, name
    assert f"{victim}  resuming after step " in output
    records = read_records(tmp_path / "w/results")
    assert [record.status for record in records] == ["finished"] * len(plans)
    assert not list((tmp_path / "w/runs/.leases").iterdir())


def test_a_start_on_one_host_only_says_so_and_ends():
    """In a cluster that is found: that of Slurm, with two tasks of which one has come."""
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    command = ["-m", "experiments.train", "--workdir=x y", "--start_timeout=1", "--distributed"]
    with running([command], slurm) as started:
        ((status, output, errors),) = ends(started)
    assert (status, output) == (2, "")
    assert errors.startswith(
        "error: timed out after 1 s waiting for the other hosts. Run the same command on every"
    )
    assert "--worker=all --command='python -m experiments.train --config=configs/base.py" in errors
    assert not Path("x y").exists()


def test_no_cluster_to_join():
    ((status, _, errors),) = run_all([["-m", "experiments.train", "--workdir=x", "--distributed"]])
    assert status == 2
    assert errors.startswith("error: --distributed: cannot join a cluster (")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, 2, None), "give all three, or none"),
        (("here", 2, 0), "--coordinator_address=here: expected host:port"),
        (("host:1", 2, 2), "--process_id=2: expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(values, message, monkeypatch):
    address, count, index = values
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    monkeypatch.setattr(hosts, "FLAGS", SimpleNamespace(distributed=True, **given))
    with pytest.raises(UserError, match=message):
        hosts.start()


@pytest.mark.parametrize(
    ("processes_of_row", "shares"),
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor over two processes
        ([[0, 1, 2, 3]], [(0, 1)] * 4),
        ([[1], [0], [1], [0]], [(1, 2), (0, 2)]),
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(processes_of_row, shares):
    for process, (index, count) in enumerate(shares):
        expected = {"process_index": index, "process_count": count}
        assert partition._share(processes_of_row, process) == expected


def test_rows_that_processes_share_in_part_are_refused():
    with pytest.raises(UserError, match=r"mesh\.tensor: 2 does not fit 2 processes"):
        partition._share([[0, 0], [0, 1], [1, 1]], 0)


def test_one_process_needs_nobody():
    assert processes.of_first(lambda: object) is object
    processes.check_same("data", "x")
    mesh = partition.make_mesh(partition.MeshConfig(data=8, fsdp=1, tensor=1))
    vote = processes.StopVote(mesh)
    assert (vote.cast(True), vote.cast(False)) == (True, False)
