"""Where designs stand at their cost, against a plain loop, and the figure and table of it."""

import dataclasses

import numpy as np
import pytest
from test_committed import RESULTS
from test_latency import synthetic
from test_results import make_record

from experiments.reporting import pareto, tables
from experiments.reporting.pareto import Cost, Entry, Pareto
from mobilellm_jax.analysis.latency_table import read_table, write_table
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.analysis.statistics import mean_and_interval
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs.latency import features, split

LATENCY = {"table": "a.json", "sha256": "ab", "device": "a CPU", "weights": "float32"}
LATENCY |= {"median_error": {"decode_ms": 0.05, "prefill_ms": 0.1}}
SCORES = {2: (3.62, 3.65, 3.6), 4: (3.55, 3.57, 3.56), 8: (3.53, 3.58, 3.56)}


def records(**changes):
    return [
        make_record(depth=depth, seed=seed, score=score, **changes)
        for depth, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]


def with_latency(found):
    """What a study matched by latency writes: the deepest is the slowest to read a prompt."""
    times = {2: (0.5, 2.0), 4: (0.4, 3.0), 8: (0.45, 4.0)}
    return [
        dataclasses.replace(
            run,
            latency={
                **LATENCY,
                **dict(zip(("decode_ms", "prefill_ms"), times[run.point_index], strict=True)),
            },
        )
        for run in found
    ]


def test_standing_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    entries, cost = {}, {}
    for place in range(40):
        label = f"p{place}"
        entries[label] = Entry(label, label, "", mean_and_interval(rng.normal(0, 1, 3).tolist()))
        cost[label] = float(rng.integers(1, 8))
    arms = {label: f"arm {place % 2}" for place, label in enumerate(entries)}
    found = pareto.standing(Pareto(entries, ()), Cost("ms", cost), arms)
    for label, entry in entries.items():
        beaten = clearly = False
        for other, rival in entries.items():
            if arms[other] != arms[label] or cost[other] > cost[label]:
                continue
            if rival.estimate.mean < entry.estimate.mean:
                beaten = True
                reach = rival.estimate.half_width + entry.estimate.half_width
                clearly |= entry.estimate.mean - rival.estimate.mean > reach
        word = found[label].split()[0]
        assert word == ("behind" if clearly else "open" if beaten else "front")
    assert {word.split()[0] for word in found.values()} == {"front", "open", "behind"}


def test_latencies_of_records_are_shown(tmp_path):
    study = study_of(with_latency(records()))
    found = pareto.pareto_of(study, tmp_path)
    columns = pareto.columns(study, found)
    assert columns["ms of a token"] == ["0.5", "0.4", "0.45"]
    assert columns["by ms of a token"] == ["open", "front", "front"]
    assert columns["by ms of a prompt"] == ["front", "front", "front"]
    assert "a.json (a CPU)" in pareto.sources(found)
    assert "ms of a token 5% and ms of a prompt 10%" in pareto.sources(found)
    figure = pareto.draw(study, found)
    assert [axes.get_xlabel() for axes in figure.axes] == ["ms of a token"]  # bytes are equal
    assert study.verdict.mismatch["decode_ms"] == pytest.approx(0.25)
    assert any("decode ms" in part for part in tables.designs(study))


def test_a_study_matched_by_latency_says_so():
    study = study_of(with_latency(records(matched="decode_ms")))
    assert study.verdict.unmatched == pytest.approx(0.25)
    assert any("equal decode ms, but differ by up to 25.0%" in line for line in study.verdict.warnings)


def test_another_table_among_the_runs_is_a_warning():
    runs = with_latency(records())
    runs[0] = dataclasses.replace(runs[0], latency={**runs[0].latency, "sha256": "cd"})
    assert any("sha256 of the table of latency" in line for line in study_of(runs).verdict.warnings)


def test_quantized_runs_stand_beside_their_design(tmp_path):
    entry = {"bytes": 1_000_000, "full_bytes": 4_000_000, "gap": 0.01, "full_loss": 3.6, "agreement": 0.9}
    runs = [dataclasses.replace(r, quantized={"w8": {**entry, "loss": r.loss + 0.01}}) for r in records()]
    study = study_of(runs)
    found = pareto.pareto_of(study, tmp_path)
    assert [name for name in found.entries if "w8" in name] == ["2 x 128, w8", "4 x 128, w8", "8 x 128, w8"]
    assert found.entries["4 x 128, w8"].estimate.mean == pytest.approx(3.57)
    assert [cost.name for cost in found.costs] == ["bytes of the weights"]
    assert pareto.columns(study, found)["bytes of the weights"][-1] == "1 M"
    assert "No latency: measure a table" in pareto.sources(found)
    assert pareto.draw(study, found) is not None


@pytest.fixture(scope="module")
def committed():
    return read_records(RESULTS / "layer_sharing" / "tiny")


def test_quantized_runs_take_the_time_of_llama_cpp_in_as_many_bits(committed, tmp_path):
    entry = {"bytes": 1_000_000, "full_bytes": 4_000_000, "gap": 0.01, "full_loss": 3.6, "agreement": 0.9}
    runs = [dataclasses.replace(r, quantized={"w4:32": {**entry, "loss": 4.0}}) for r in committed]
    table = read_table(RESULTS.parent / "latency/amd_epyc_llama_cpp.json")
    write_table(table, tmp_path / "latency/a.json")
    study = study_of(runs)
    (in_few_bits, _) = pareto.pareto_of(study, tmp_path).costs
    assert in_few_bits.name == "ms of a token in llama.cpp"
    config = from_config_dict(study.points["immediate"].config)
    for label, kind in (("immediate", "f16"), ("immediate, w4:32", "q4_0")):
        fit = table.fits[kind]["decode_ms"]
        work = features("decode_ms", config.model, config.data.sequence_length, kind)
        work = split(work, fit["cache_mb"])
        expected = sum(fit["coefficients"][name] * amount for name, amount in work.items())
        assert in_few_bits.of[label] == pytest.approx(expected)


def test_the_newest_table_of_the_workdir_predicts(committed, tmp_path):
    table = synthetic()
    old = dataclasses.replace(table, created="2025-01-01T00:00:00+00:00", program="another program")
    write_table(old, tmp_path / "latency/b.json")
    write_table(table, tmp_path / "latency/a.json")
    study = study_of(committed)
    found = pareto.pareto_of(study, tmp_path)
    config = from_config_dict(study.points["immediate"].config)
    expected = table.latency().predict(config.model, config.data.sequence_length)
    assert [cost.of["immediate"] for cost in found.costs[:2]] == pytest.approx(list(expected.values()))
    assert found.costs[0].source == "a.json (a CPU, 1 thread, a program)"
