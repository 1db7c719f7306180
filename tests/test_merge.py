"""Merging records: byte for byte, all or none, and nothing that cannot be compared."""

import os
from pathlib import Path

import pytest
from test_results import make_record

from experiments.reporting import merging
from mobilellm_jax.analysis.records import write_record
from mobilellm_jax.errors import UserError


def fill(workdir: Path, **records):
    for name, record in records.items():
        write_record(record, workdir / "results/shape/tiny" / f"{name}.json")
    return workdir


def content(workdir: Path):
    return {
        str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()
    }


@pytest.fixture
def both(tmp_path):
    """Two workdirs of one study, with one run in common."""
    shared = make_record(seed=0)
    here = fill(tmp_path / "here", s0=shared, s1=make_record(seed=1))
    return here, fill(tmp_path / "there", s0=shared, s2=make_record(seed=2), s3=make_record(seed=3))


def test_records_are_copied_as_they_are(both):
    here, there = both
    before = content(here)
    found = merging.plan(there, here)
    assert found.new == ["shape/tiny/s2", "shape/tiny/s3"]
    assert found.same == ["shape/tiny/s0"]
    assert content(here) == before
    merging.copy(found.new, there, here)
    assert content(here) == before | content(there)
    again = merging.plan(there, here)
    assert (again.new, len(again.same)) == ([], 3)


def test_a_new_study_and_a_new_workdir(both, tmp_path):
    _, there = both
    write_record(make_record(study="other"), there / "results/other/tiny/s0.json")
    found = merging.plan(there, tmp_path / "new")
    merging.copy(found.new, there, tmp_path / "new")
    assert content(tmp_path / "new") == content(there)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("s0", {"seed": 0, "score": 3.1}, r"1 runs have other records .*: shape/tiny/s0 \(final, best, "),
        (
            "s4",
            {"seed": 4, "data": {**make_record().data, "source_sha256": "00" * 32}},
            "source_sha256 of the data is",
        ),
        ("s4", {"seed": 4, "steps": 3}, "shape:tiny: steps is"),
        ("copy", {"seed": 1}, "2 records of '4 x 128' seed 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(both, name, change, message):
    here, there = both
    fill(there, **{name: make_record(**change)})
    before = content(here)
    with pytest.raises(UserError, match=message):
        merging.plan(there, here)
    assert content(here) == before


def test_a_damaged_record_is_refused(both):
    here, there = both
    path = there / "results/shape/tiny/s2.json"
    path.write_text(path.read_text().replace('"seed": 2', '"seed": 7'))
    with pytest.raises(UserError, match=r"s2\.json: not a readable JSON record: changed since"):
        merging.plan(there, here)


def test_a_workdir_without_records_is_refused(both, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/results: no records of runs"):
        merging.plan(tmp_path / "nowhere", both[0])


@pytest.mark.parametrize("kind", ["appeared", "changed", "disk"])
def test_nothing_is_copied_by_halves(both, monkeypatch, kind):
    here, there = both
    found = merging.plan(there, here)
    if kind == "appeared":  # another process wrote it since
        fill(here, s3=make_record(seed=3, score=3.0))
    if kind == "changed":
        path = there / "results/shape/tiny/s3.json"
        path.write_text(path.read_text().replace('"seed": 3', '"seed": 7'))
    if kind == "disk":
        link = os.link

        def full(source, target):
            if "s3" in str(target):
                raise OSError(28, "No space left on device")
            link(source, target)

        monkeypatch.setattr(os, "link", full)
    before = content(here)
    with pytest.raises(UserError, match=r"here/results: .*s3.*; nothing was copied|No space left"):
        merging.copy(found.new, there, here)
    assert content(here) == before
