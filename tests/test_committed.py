"""The committed records are sealed, reports say what they show, and figures leave no seed out."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from configs import shape_laws
from experiments.reporting import abilities, beside_paper, claims, figures, second_use, tables
from mobilellm_jax.analysis import rate_line
from mobilellm_jax.analysis.cells import cells_of
from mobilellm_jax.analysis.facts import points_of
from mobilellm_jax.analysis.records import by_study, read_records
from mobilellm_jax.analysis.statistics import decide
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.storage import sealed

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"


def test_every_record_has_a_seal():
    """Which `read_record` checks. An older one has none: read it and write it again, once."""
    paths = sorted(RESULTS.rglob("*.json"))
    assert len(paths) >= 3400
    assert not [path for path in paths if sealed.SEAL not in json.loads(path.read_bytes())]


def test_under_completep_eight_thin_blocks_and_two_wide_ones_differ_by_less_than_the_noise():
    """At 328 thousand parameters, each at its best rate. Two seeds show no more: +-0.07."""
    scores: dict[str, dict[int, float]] = {}
    ends = {}
    for preset in ("depth_completep", "width_completep"):
        for run in read_records(RESULTS / "lr_transfer" / preset):
            if run.phase == "comparison":
                scores.setdefault(f"{preset}: {run.point}", {})[run.seed] = run.loss
                ends[f"{preset}: {run.point}"] = run
    pair = ("depth_completep: 8 x 64", "width_completep: 2 x 128")
    deep, wide = (ends[label] for label in pair)
    assert deep.parameters["non_embedding"] == pytest.approx(wide.parameters["non_embedding"], rel=2e-3)
    assert (deep.tokens_seen, deep.data["source_sha256"]) == (wide.tokens_seen, wide.data["source_sha256"])
    difference = decide(scores, [pair], 0.05)[0].difference
    assert difference.mean == pytest.approx(0.011, abs=5e-4)
    assert abs(difference.mean) < difference.se
    assert (difference.low, difference.high) == pytest.approx((-0.058, 0.079), abs=1e-3)


@pytest.mark.slow
def test_rates_of_costly_cells_are_on_the_line_through_the_optima_of_tuned_ones():
    cells, _ = cells_of(read_records(RESULTS / "shape_laws"))
    line = rate_line.fit([cell for cell in cells if cell.arm == "completep"])
    untuned = [name for name in shape_laws.CELLS if not shape_laws.study(name).learning_rates]
    assert untuned == ["100k_32", "300k_8", "300k_32", "1m_2", "1m_8"]
    for name in untuned:
        size, horizon = name.split("_")
        parameters = {"100k": 100_000, "300k": 300_000, "1m": 1_000_000}[size]
        one = dataclasses.replace(cells[0], parameters=parameters, tokens=parameters * int(horizon))
        rate = shape_laws.get_config(name).optimizer.learning_rate
        assert math.log2(rate) == pytest.approx(line.octaves(one), abs=0.01)


@pytest.mark.slow
def test_an_end_at_zero_leaves_the_spread_as_it_is():
    """As docs/protocol.md says, of the same seeds."""
    points = points_of(read_records(RESULTS / "noise" / "schedule"))
    scores = [points[label].scores for label in ("cosine to a tenth", "linear to zero")]
    assert scores[0].keys() == scores[1].keys() == set(range(8))
    cosine, line = (np.array(list(of.values())) for of in scores)
    said = f"{np.std(cosine, ddof=1):.4f} and {np.std(line, ddof=1):.4f} nats with the"
    page = " ".join((EXPERIMENTS.parent / "docs/protocol.md").read_text(encoding="utf-8").split())
    assert f"{said} same 8 seeds, and is worse by {np.mean(line - cosine):.3f}," in page


@pytest.fixture(scope="module")
def studies():
    """All of them; reading two thousand records and their statistics take half a minute."""
    return [study_of(records) for records in by_study(read_records(RESULTS)).values()]


@pytest.mark.slow
def test_reports_say_what_the_records_show(studies):
    found = {study.stem: study.verdict for study in studies}
    assert {"depth_vs_width-tiny", "layer_sharing-tiny", "khop-tiny"} <= found.keys()
    for study in studies:
        text = (EXPERIMENTS / f"reports/{study.stem}.md").read_text()
        assert tables.plain(study.verdict.sentence) in text, study.stem
        assert all(tables.plain(warning) in text for warning in study.verdict.warnings), study.stem
        csv = (EXPERIMENTS / f"figures/{study.stem}.csv").read_text()
        assert csv == tables.csv_text(study), study.stem
    page = (EXPERIMENTS / "claims.md").read_text()
    assert page.startswith(claims.page(studies))
    gallery = page.split("## All figures")[1]
    shown = set(re.findall("^### (.*)", gallery, re.MULTILINE))
    assert shown == {f"{study.facts.study}, {study.facts.preset}" for study in studies}
    assert all((EXPERIMENTS / link).exists() for link in re.findall(r"\]\(([^)]*)\)", gallery))
    (same,) = found["noise-tiny"].comparisons
    assert same.word == "no difference"


@pytest.mark.slow
def test_pages_over_several_studies_say_what_the_records_show(studies, tmp_path):
    """Which the README quotes."""
    second_use.write(studies, tmp_path)
    abilities.write(studies, tmp_path)
    written = sorted((tmp_path / "reports").glob("*.md"))
    assert {"second_use.md", "playground-tiny.md"} <= {path.name for path in written}
    for path in written:
        assert path.read_text() == (EXPERIMENTS / "reports" / path.name).read_text(), path.name


@pytest.mark.slow
def test_every_seed_is_inside_the_axes(studies):
    """Its dot may lie outside of the interval, for which alone there was room once: 12 were cut off."""
    seeds, hidden = 0, []
    for study in studies:
        for figure in (figures.outcome(study), figures.costs(study), beside_paper.draw(study)):
            for axes in figure.axes if figure else []:
                (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
                lines = [line.get_xydata() for line in axes.lines if line.get_marker() == "."]
                dots = [(x, y) for line in lines for x, y in line]
                seeds += len(dots)
                hidden += [
                    (study.stem, x, y) for x, y in dots if not (left <= x <= right and low <= y <= high)
                ]
    assert seeds > 900
    assert not hidden
