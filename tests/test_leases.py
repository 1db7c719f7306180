"""Leases: held by one worker at a time, taken over from those that died or stand still, and from no other."""

import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import start
from test_sweep import write_study

from experiments.runner import leases
from experiments.runner.leases import Leases

HOLD = """
import sys, time
from experiments.runner import leases
leases.BEAT_S = float(sys.argv[2])
print(leases.Leases(sys.argv[1]).take(["a/b"]), flush=True)
time.sleep(60)
"""

# Takes and releases one name again and again; a file made exclusively shows that nobody else holds it.
CONTEND = """
import os, sys, time
from experiments.runner.leases import Leases
mine, taken, end = Leases(sys.argv[1]), 0, time.monotonic() + 1.5
while time.monotonic() < end or not taken:
    if mine.take(["point"]):
        os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))
        os.unlink(sys.argv[2])
        mine.release("point")
        taken += 1
    time.sleep(0.001 * (os.getpid() % 7))
print(taken)
"""


def python(*arguments):
    command = [sys.executable, "-c", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds "a/b"."""
    process = python(HOLD, tmp_path, 0.05)
    assert process.stdout.readline() == "a/b\n"
    yield process
    process.kill()
    process.communicate()


def test_one_worker_holds_a_name_until_it_releases_it(tmp_path):
    one, two = Leases(tmp_path), Leases(tmp_path)
    assert one.take(["a/b", "c"]) == "a/b"
    assert two.take(["a/b"]) is None
    assert list(two.holders()) == ["a/b"]
    assert two.take(["a/b", "c"]) == "c"
    assert one.holders().keys() == {"c"}
    one.release("a/b")
    assert two.take(["a/b"]) == "a/b"
    for name in ("a/b", "c"):
        two.release(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["my~study/tiny/p", "a%2Fb", "a@b", "x/" + "0 " * 200 + "1"])
def test_a_name_of_any_characters_and_length_is_held_by_one(tmp_path, name):
    one, two = Leases(tmp_path), Leases(tmp_path)
    assert one.take([name]) == name
    assert two.take([name]) is None
    assert two.take([f"{name[:-1]}2"])
    one.release(name)
    assert two.take([name]) == name


def test_a_lease_beats_more_than_twice_in_its_life():
    """So that one late beat is not taken for the end of its worker."""
    assert 2 * leases.BEAT_S < leases.LIFE_S


def test_a_lease_that_cannot_be_written_is_an_error_for_people_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, _):
        os.close(os.open(path, os.O_CREAT))  # the file is made, and then there is no room for what is in it
        raise OSError(errno.ENOSPC, "No space left on device")

    mine = Leases(tmp_path)
    monkeypatch.setattr(type(mine._directory), "write_text", full)
    with pytest.raises(leases.LeaseError, match=r"cannot write there \(No space left on device\)") as caught:
        mine.take(["a/b"])
    assert caught.value.name == "a/b"
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert mine.take(["a/b"]) == "a/b"
    mine.release("a/b")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"7", b"null", b'{"pid": 1}', b'"machine"', b""])
def test_a_file_that_is_no_lease_holds_its_name_until_its_time_is_over(tmp_path, monkeypatch, content):
    (tmp_path / "a@somebody").write_bytes(content)
    mine = Leases(tmp_path)
    assert mine.holders() == {"a": "somebody"}
    assert mine.take(["a", "b"]) == "b"
    monkeypatch.setattr(leases, "LIFE_S", -1.0)
    assert mine.take(["a"]) == "a"
    for name in ("a", "b"):
        mine.release(name)


def test_of_two_that_write_at_once_not_both_hold(tmp_path, monkeypatch):
    """The second writes between the first one's two looks, and the first gives way."""
    one, two = Leases(tmp_path), Leases(tmp_path)
    content, taken = leases._content, []

    def while_two_takes():
        monkeypatch.setattr(leases, "_content", content)
        taken.append(two.take(["a"]))
        return content()

    monkeypatch.setattr(leases, "_content", while_two_takes)
    assert one.take(["a"]) is None
    assert taken == ["a"]
    assert two.holders() == {}  # nothing of the first is left


def test_the_lease_of_a_process_that_died_here_is_over_at_once(tmp_path, holder):
    mine = Leases(tmp_path)
    assert mine.take(["a/b"]) is None
    holder.kill()
    holder.wait()
    assert mine.take(["a/b"]) == "a/b"
    mine.release("a/b")


def test_a_process_that_has_the_number_of_a_dead_one_is_not_that(tmp_path, holder, monkeypatch):
    assert Leases(tmp_path).take(["a/b"]) is None
    monkeypatch.setattr(leases, "_started", lambda pid: "another time")
    assert Leases(tmp_path).take(["a/b"]) == "a/b"


def test_a_lease_of_another_machine_is_over_when_it_does_not_change(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")
    monkeypatch.setattr(leases, "LIFE_S", 0.5)
    mine = Leases(tmp_path)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert mine.take(["a/b"]) is None  # it beats
        time.sleep(0.1)
    holder.kill()
    holder.wait()
    assert mine.take(["a/b"]) is None  # nobody can know yet
    time.sleep(0.6)
    assert mine.take(["a/b"]) == "a/b"
    mine.release("a/b")


def test_one_that_waits_for_the_dead_gives_way_to_the_living(tmp_path, holder, monkeypatch):
    """On another machine: the holder beats, and then stands still."""
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")
    mine = Leases(tmp_path)
    worker = mine.take_unless_alive("a/b")
    assert worker
    assert f"-{holder.pid}-" in worker
    monkeypatch.setattr(leases, "LIFE_S", 0.5)
    holder.kill()
    assert mine.take_unless_alive("a/b") is None
    assert Leases(tmp_path).holders().keys() == {"a/b"}
    mine.release("a/b")


def test_a_lease_released_and_taken_again_during_a_look_is_not_deleted(tmp_path, monkeypatch):
    one, two = Leases(tmp_path), Leases(tmp_path)
    assert one.take(["a"]) == "a"
    is_over = two._is_over

    def while_one_moves(path):
        one.release("a")
        try:
            return is_over(path)
        finally:
            assert one.take(["a"]) == "a"

    monkeypatch.setattr(two, "_is_over", while_one_moves)
    two.holders()
    assert Leases(tmp_path).holders().keys() == {"a"}


def test_a_name_that_one_worker_takes_again_and_again_is_not_seen_as_one_dead_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "LIFE_S", 0.2)
    one, two = Leases(tmp_path), Leases(tmp_path)
    for _ in range(4):
        assert one.take(["a"]) == "a"
        assert two.take(["a"]) is None
        one.release("a")
        time.sleep(0.1)


def train(study, workdir):
    flags = ["--config.train.steps=100000", "--config.train.checkpoint_every=10"]
    flags += ["--config.train.log_every=10", "--config.train.eval_every=100000"]
    return start("experiments.train", f"--config={study}", f"--workdir={workdir}", *flags)


@pytest.mark.slow
def test_two_trainings_in_one_directory_exclude_each_other_until_one_is_killed(tmp_path):
    study = write_study(tmp_path)
    first = train(study, tmp_path / "w")
    try:
        assert any(line.startswith("step 40/") for line in first.stdout)
        second = train(study, tmp_path / "w")
        output, errors = second.communicate(timeout=300)
        assert (second.returncode, output, errors.count("\n")) == (2, "", 1), errors
        assert f"another training is running there: {socket.gethostname()}-{first.pid}-" in errors
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    third = train(study, tmp_path / "w")
    try:
        resumes = "resuming after step"
        said = list(itertools.takewhile(lambda line: not line.startswith(resumes), third.stdout))
        words = ["model", "training", "data", "devices", "workdir", "the", "compiling"]
        assert [line.split()[0] for line in said if not line.startswith("compiled in")] == words
        assert said[4].endswith("(to be resumed from its newest checkpoint)\n")
        assert any(line.startswith("step ") for line in third.stdout)
        third.send_signal(signal.SIGTERM)
        third.communicate(timeout=300)
        assert third.returncode == 75
        assert not list((tmp_path / "w/.leases").iterdir())
    finally:
        third.kill()
        third.communicate()


def test_a_worker_whose_lease_was_taken_for_dead_ends_at_once(tmp_path, holder):
    (lease,) = tmp_path.iterdir()
    lease.unlink()
    _, errors = holder.communicate(timeout=60)
    assert holder.returncode == 1
    assert errors == (
        f"error: lost the lock {lease}: this process was unresponsive for 60 s and another worker took over\n"
    )
    assert not list(tmp_path.iterdir())


def test_four_processes_never_hold_one_name_at_once(tmp_path):
    workers = [python(CONTEND, tmp_path / "leases", tmp_path / "held") for _ in range(4)]
    for worker in workers:
        output, errors = worker.communicate(timeout=100)
        assert (worker.returncode, errors) == (0, "")
        assert int(output) > 0
