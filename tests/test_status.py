"""What `sweep --status` says of a workdir."""

import json
import re
import subprocess
import sys

import pytest
from commands import ROOT, command
from test_sweep import losses, points, write_study

from experiments.runner import leases, sweeping
from experiments.runner.progress import Progress
from experiments.runner.status import status
from mobilellm_jax.config import to_dict
from mobilellm_jax.errors import UserError


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study with a search of its rate, whose runs take no time; reports are not made."""
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("learning_rates=()", "learning_rates=(2**-9, 2**-7)"))
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + (octave + 8) ** 2))
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    return path


def rows(text):
    """The cells of each point, by its label."""
    cells = (re.split(r"  +", line) for line in text.splitlines() if line.startswith(("none", "reverse")))
    return {label: rest for label, *rest in cells}


def files_of(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }


def test_status_says_what_is_done_missing_and_at_work_and_changes_nothing(study, tmp_path):
    workdir, both = tmp_path / "w", points(study)
    assert sweeping.sweep(points(study, only=["none"]), workdir, jobs=1) == 0
    tried = len(list((workdir / "results").rglob("none-lr*.json")))
    next((workdir / "results").rglob("none-s1.json")).unlink()
    other = leases.Leases(workdir / leases.IN_WORKDIR)
    assert other.take([f"{both[1].name} tuning"])
    dead = workdir / "runs/.leases" / f"{leases.escaped(both[0].name)}@elsewhere-1-a"
    dead.write_text(json.dumps({"machine": leases._machine(), "pid": 1 << 30, "started": "1"}))
    before = files_of(workdir)
    text = status(both, workdir)
    assert files_of(workdir) == before
    other.release(f"{both[1].name} tuning")
    found = rows(text)
    rate = f"{2**-8:.3g}"
    assert found["none"] == [f"{tried} tried, over", rate, "1/2", "1"]
    assert found["reverse"][:4] == ["0 tried, goes on", "not fitted", "0/2", str(both[1].runs)]
    assert re.fullmatch(rf"tuning by {re.escape(other._worker)}, \d s ago", found["reverse"][4])
    done, left = tried + 1, 1 + both[1].runs
    assert text.splitlines()[-1] == (
        f"{workdir}: {done} of about {done + left} runs are done, about {left} are missing; "
        "1 of 2 points are being worked on"
    )
    with pytest.raises(UserError, match=r"train\.steps is 4 there and 5 here"):
        status(points(study, {"train.steps": 5}), workdir)


def test_a_lease_whose_name_is_cut_is_found(study, tmp_path):
    plan = " ".join(map(str, range(56)))
    text = study.read_text().replace('"none", "reverse"', f'"none", "{plan}"').replace("(1, 2)", "(1, 1)")
    text = text.replace('matched="non_embedding_parameters"', 'matched="tokens"')
    study.write_text(text.replace('"model.depth": 2', '"model.depth": 56'))
    point = max(points(study), key=lambda point: len(point.name))
    other, name = leases.Leases(tmp_path / "w" / leases.IN_WORKDIR), f"{point.name} tuning"
    assert other.take([name])
    text = status([point], tmp_path / "w")
    other.release(name)
    assert f"tuning by {other._worker}" in text


def test_a_workdir_that_is_not_there_is_named(study, tmp_path):
    result = command("experiments.sweep", f"--config={study}", f"--workdir={tmp_path}/no", "--status")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: --workdir={tmp_path}/no: there is no such directory; no sweep has run there\n"
    )


def test_status_starts_without_jax(study, tmp_path):
    """Which takes longer to import than all the rest; a real process, as a fork has imported it."""
    (tmp_path / "w").mkdir()
    run = "runpy.run_module('experiments.sweep', run_name='__main__')"
    program = f"import runpy, sys; sys.modules['jax'] = None; {run}"
    line = [sys.executable, "-c", program, f"--config={study}", f"--workdir={tmp_path}/w", "--status"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"{tmp_path}/w: 0 of about ")


def test_a_comparison_that_was_stopped_in_its_first_run_goes_on_at_its_rate(study, tmp_path):
    """It has a checkpoint and no record; the others are fitted anew, as more may have been tried."""
    (none,), workdir = points(study, only=["none"]), tmp_path
    first = next(none.comparison_runs(0.003))
    folder = workdir / "runs" / first.name
    (folder / "checkpoints/2").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(first.config)))
    assert Progress(points(study), workdir).rates() == {none.name: 0.003}
