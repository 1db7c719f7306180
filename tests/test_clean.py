"""Cleaning: only what nobody needs goes, nothing before --yes, and nothing that somebody is working on."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import command
from filelock import FileLock
from test_results import make_diverged, make_record

from experiments import clean
from experiments.runner import cleaning
from experiments.runner.leases import IN_WORKDIR, Leases
from mobilellm_jax.analysis.records import write_record
from mobilellm_jax.data.tokenizers import CARD_FILE
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.checkpoint import MANIFEST, save_params

ROOT = Path(__file__).parents[1]
HOUR, DAY = 3600, 86400


def save(run, *steps):
    for step in steps:
        save_params(run / "checkpoints" / str(step), {"a": np.ones(step, np.float32)})


def age(path, seconds):
    for file in (path, *path.rglob("*")):
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def sweep(tmp_path):
    """A sweep: a run that finished, one that goes on, one that diverged, one that is worked on."""
    runs, results = tmp_path / "runs/s/p", tmp_path / "results/s/p"
    for name in ("a-s0", "b-s0", "c-s0", "d-s0"):
        save(runs / name, 2, 4, 6)
    write_record(make_record(), results / "a-s0.json")
    write_record(make_diverged(), results / "c-s0.json")
    write_record(make_record(), results / "d-s0.json")
    (runs / "a-s0/checkpoints/8.orbax-checkpoint-tmp").mkdir()
    (runs / "b-s0/checkpoints/6" / MANIFEST).unlink()
    (runs / "d-s0/checkpoints/6" / MANIFEST).unlink()
    return tmp_path


def there(workdir):
    return {str(path.relative_to(workdir)) for path in workdir.rglob("*") if ".leases" not in str(path)}


def listed(workdir, newest_too=False):
    found, busy = cleaning.in_workdir(workdir, newest_too)
    return {str(item.path.relative_to(workdir / "runs/s/p")) for item in found}, busy


def listed_paths(workdir):
    found, busy = cleaning.in_workdir(workdir, newest_too=False)
    return [item.path for item in found], busy


def test_what_is_listed_in_a_sweep(sweep):
    Leases(sweep / IN_WORKDIR).take(["s/p/d tuning"])
    half = {"a-s0/checkpoints/8.orbax-checkpoint-tmp", "b-s0/checkpoints/6"}
    done = {"a-s0/checkpoints/2", "a-s0/checkpoints/4"}
    assert listed(sweep) == (half | done, [sweep / "runs/s/p/d-s0"])
    assert listed(sweep, newest_too=True)[0] == half | done | {"a-s0/checkpoints/6"}


def test_a_run_whose_newest_checkpoint_is_damaged_keeps_all(sweep):
    (file,) = (sweep / "runs/s/p/a-s0/checkpoints/6").glob("*.safetensors")
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert not {f"a-s0/checkpoints/{step}" for step in (2, 4)} & listed(sweep)[0]


def test_nothing_is_removed_without_yes(sweep, capsys):
    before, used = there(sweep), sum(path.stat().st_size for path in sweep.rglob("*") if path.is_file())
    found, _ = cleaning.in_workdir(sweep, False)
    clean.finish(found, yes=False)
    assert capsys.readouterr().out.splitlines()[-1].endswith("; --yes removes them")
    assert there(sweep) == before
    clean.finish(found, yes=True)
    left = sum(path.stat().st_size for path in sweep.rglob("*") if path.is_file())
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"6 of 6 items removed, {used - left:,} bytes freed"
    gone = {path.removeprefix("runs/s/p/") for path in before - there(sweep) if path.count("/") == 5}
    assert gone == {
        *("a-s0/checkpoints/2", "a-s0/checkpoints/4", "a-s0/checkpoints/8.orbax-checkpoint-tmp"),
        *("b-s0/checkpoints/6", "d-s0/checkpoints/6", "d-s0/checkpoints/2"),
    }
    assert listed(sweep) == (set(), [])


def test_a_run_that_is_taken_meanwhile_is_left_alone(sweep):
    found, _ = cleaning.in_workdir(sweep, False)
    item = next(item for item in found if "a-s0" in str(item.path))
    leases = Leases(sweep / IN_WORKDIR)
    leases.take(["s/p/a"])
    assert not cleaning.remove(item)
    assert item.path.exists()
    leases.release("s/p/a")
    assert cleaning.remove(item)
    assert not cleaning.remove(item)  # gone


def test_what_is_deleted_while_it_lists_is_left_out(sweep, monkeypatch):
    real, (gone, half) = cleaning.is_held, (sweep / "runs/s/p/b-s0", sweep / ".config.json.12.tmp")
    half.write_text("x")
    age(half, 2 * HOUR)

    def is_held(run):
        shutil.rmtree(gone, ignore_errors=True)
        half.unlink(missing_ok=True)
        return real(run)

    monkeypatch.setattr(cleaning, "is_held", is_held)
    found, _ = listed_paths(sweep)
    assert {path.parts[len(sweep.parts) + 3] for path in found} == {"a-s0", "d-s0"}
    size = cleaning._size

    def shrinking(path):
        shutil.rmtree(path)  # another `clean`
        return size(path)

    monkeypatch.setattr(cleaning, "_size", shrinking)
    assert [item.size for item in cleaning.in_workdir(sweep, False)[0]] == [0] * len(found)


def test_a_run_of_its_own(tmp_path):
    save(tmp_path, 2, 4)
    write_record(make_record(), tmp_path / "record.json")
    leases = Leases(tmp_path / ".leases")
    leases.take(["run"])
    assert cleaning.in_workdir(tmp_path, False) == ([], [tmp_path])
    leases.release("run")
    (item,), _ = cleaning.in_workdir(tmp_path, False)
    assert item.path == tmp_path / "checkpoints/2"


def test_leases_of_the_dead_and_half_written_files(tmp_path):
    Leases(tmp_path / ".leases").take(["other"])
    code = "import sys; from experiments.runner.leases import Leases; Leases(sys.argv[1]).take(['run'])"
    subprocess.run([sys.executable, "-c", code, tmp_path / ".leases"], check=True, cwd=ROOT)
    for name in (".config.json.12.tmp", ".data.json.13.tmp", "notes.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("x")
    for name in (".config.json.12.tmp", "notes.tmp", ".mine.tmp"):
        age(tmp_path / name, 2 * HOUR)
    found, _ = cleaning.in_workdir(tmp_path, False)
    assert [item.what for item in found] == ["lease of a dead worker", "half-written file"]
    assert found[0].path.name.startswith("run@")
    assert found[1].path.name == ".config.json.12.tmp"


def test_caches_are_cleaned_by_age(tmp_path):
    for name in ("old", "new", "used", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CARD_FILE).write_text("{}")
        (tmp_path / name / "rows").write_text("rows")
        (tmp_path / f"{name}.lock").touch()
    for name in ("gone.lock", "xla/a-cache", "xla/a-atime", "xla/b-cache", "xla/b-atime", "mine/notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "old.tmp-99").mkdir()
    for path in (path for path in tmp_path.iterdir() if path.name != "new"):
        age(path, 40 * DAY)
    os.utime(tmp_path / "used/rows", (time.time() - DAY, time.time() - 40 * DAY))  # read a day ago
    os.utime(tmp_path / "xla/b-atime")
    found = cleaning.in_cache(tmp_path, tmp_path / "xla", 30 * DAY)
    names = {str(item.path.relative_to(tmp_path)) for item in found}
    assert names == {"old", "held", "old.tmp-99", "gone.lock", "xla/a-cache", "xla/a-atime"}
    with FileLock(tmp_path / "held.lock"):
        left = [item.path.name for item in found if not cleaning.remove(item)]
    assert left == ["held"]
    assert {path.name for path in tmp_path.iterdir()} >= {"new", "used", "held", "mine", "xla", "new.lock"}
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("text", ["30", "d", "3w", "-1d", "1.5h", ""])
def test_an_age_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=f"--older_than={text}: expected a number"):
        clean.seconds(text)
    assert [clean.seconds(text) for text in ("5m", "12h", "30d")] == [300, 12 * HOUR, 30 * DAY]


@pytest.mark.parametrize(
    ("flag", "message"), [("--yes", "--workdir: missing"), ("--workdir=/nowhere/at/all", "no such directory")]
)
def test_bad_flags(flag, message):
    done = command("experiments.clean", flag)
    assert done.returncode == 2
    assert message in done.stderr
