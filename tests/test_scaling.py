"""Power laws and their crossing, on losses made from known ones."""

import dataclasses
import re

import numpy as np
import pytest
from commands import command, real
from test_results import make_record

from mobilellm_jax.analysis import power_laws
from mobilellm_jax.analysis.records import read_record, write_record
from mobilellm_jax.errors import UserError

SIZES = (1e4, 1e5, 1e6)


def family(scale, exponent, spread, seeds=6, seed=0):
    generator = np.random.default_rng(seed)
    noise = {size: np.exp(spread * generator.normal(size=seeds)) for size in SIZES}
    return {size: list(scale * size**-exponent * noise[size]) for size in SIZES}


def test_exact_power_law_is_found():
    found = power_laws.fit(family(12.0, 0.11, 0.0))
    assert (found.scale, found.exponent) == pytest.approx((12.0, 0.11))
    assert (found.low, found.high) == pytest.approx((0.11, 0.11))
    assert found(1e5) == pytest.approx(12.0 * 1e5**-0.11)


def test_interval_of_the_exponent_covers_the_truth():
    """A percentile bootstrap of 6 seeds covers somewhat less than 95 %."""
    laws = [power_laws.fit(family(12.0, 0.11, 0.02, seed=seed)) for seed in range(40)]
    covered = np.mean([law.low <= 0.11 <= law.high for law in laws])
    assert 0.75 <= covered < 1


def test_crossing_of_known_laws():
    """10 n^-0.1 and 20 n^-0.16 are equal at n = 2^(1 / 0.06)."""
    found = power_laws.crossing(family(10, 0.1, 0.003), family(20, 0.16, 0.003, seed=1))
    assert found.size == pytest.approx(2 ** (1 / 0.06), rel=0.3)
    assert found.low < 2 ** (1 / 0.06) < found.high
    assert found.share > 0.99


@pytest.mark.parametrize(
    ("second", "spread"),
    [((10, 0.1), 0.02), ((20, 0.16), 0.5), ((5, 0.04), 0.003), ((9, 0.1001), 0.0)],
    ids=["the same law", "too noisy", "the other way round", "below from the start"],
)
def test_no_statement_where_the_data_allow_none(second, spread):
    found = power_laws.crossing(family(10, 0.1, spread), family(*second, spread, seed=1))
    assert found.low is None
    assert found.share < 0.95


@pytest.mark.parametrize("losses", [{1e4: [1.0, 2.0]}, {1e4: [1.0, 2.0], 1e5: [1.0]}, {}])
def test_too_few_sizes_or_seeds(losses):
    with pytest.raises(UserError, match="two or more sizes with two or more seeds"):
        power_laws.fit(losses)


# The command.


@pytest.fixture
def workdir(tmp_path):
    """Three sizes and a long run: deep models lose by 0.1 at the smallest and win by 0.1 at the largest."""
    for preset, parameters, steps, gap in (
        ("small", 10_000, 500, 0.1),
        ("middle", 100_000, 500, 0.0),
        ("large", 1_000_000, 500, -0.1),
        ("long", 100_000, 2_000, -0.2),
    ):
        for depth in (1, 8):
            for seed in range(4):
                noise = 0.004 * np.random.default_rng([seed, depth, parameters]).normal()
                score = 12 * parameters**-0.1 + (gap / 2 if depth == 8 else -gap / 2) + noise
                record = make_record(
                    depth=depth,
                    seed=seed,
                    score=score,
                    preset=preset,
                    steps=steps,
                    pairs=[["8 x 128", "1 x 128"]],
                )
                budgets = {**record.budgets, "non_embedding_parameters": parameters + depth}
                write_record(
                    dataclasses.replace(record, budgets=budgets),
                    tmp_path / "results" / "shape" / preset / f"{depth}-s{seed}.json",
                )
    return tmp_path


def flags(workdir, presets="small,middle,large,long"):
    return "experiments.scaling", f"--workdir={workdir}", "--study=shape", f"--presets={presets}"


def test_report_of_three_sizes_and_a_long_run(workdir):
    done = real(*flags(workdir))
    assert done.returncode == 0, done.stderr
    crossing = re.search(r"below the shallow one at [\d,]+ parameters \[([\d,]+), ([\d,]+)\]", done.stdout)
    low, high = (float(number.replace(",", "")) for number in crossing.groups())
    assert 40_000 < low < high < 150_000  # a gap weighs more where the loss is lower
    assert "After 500 steps: shallow: loss falls as N^-0." in done.stdout
    assert "After 2,000 steps" not in done.stdout  # one size makes no line
    rows = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert "worse" in rows["small"]
    assert "better" in rows["large"]
    assert "better" in rows["long"]
    assert (workdir / "reports" / "shape-scaling.md").read_text().strip() == done.stdout.strip()
    assert (workdir / "figures" / "shape-scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("presets", "message"),
    [("small,huge", "no records of shape:huge; make them with: python -m experiments.sweep"), ("", "")],
)
def test_presets_without_records(workdir, presets, message):
    done = command(*flags(workdir, presets))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_preset_without_its_deepest_point_is_refused(workdir):
    """It would pass for the family of the deepest with another depth."""
    for path in (workdir / "results" / "shape" / "long").glob("8-*"):
        path.unlink()
    done = command(*flags(workdir))
    assert done.returncode == 2
    assert "long: no finished run of '8 x 128'; leave it out of --presets" in done.stderr


def test_presets_on_other_data_are_refused(workdir):
    for path in (workdir / "results" / "shape" / "large").iterdir():
        record = read_record(path)
        other = {**record.data, "source_sha256": "other"}
        write_record(dataclasses.replace(record, data=other), path)
    done = command(*flags(workdir))
    assert done.returncode == 2
    assert "different data, source_sha256 is" in done.stderr
