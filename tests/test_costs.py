"""What `sweep --list` says a sweep costs."""

import re

from commands import command

from experiments.runner.costs import costs, memory_bytes
from experiments.runner.studies import points_of
from mobilellm_jax.analysis.statistics import power_of_equivalence
from mobilellm_jax.costs import accounting


def cells(text):
    return dict(re.split(r" +", line, maxsplit=1) for line in text.splitlines())


def test_costs_are_those_of_all_runs():
    """Each run counted by itself; published peaks, in FLOP/s."""
    points = points_of("configs/depth_vs_width.py:paper_125m", {}, None, ["4 x 1280", "62 x 384"])
    runs = [run for point in points for run in point.comparison_runs(1e-3)]
    tokens = flops = 0.0
    for run in runs:
        train, length = run.config.train, run.config.data.sequence_length
        of_run = train.steps * train.batch_size * length
        tokens += of_run
        flops += of_run * 3 * accounting.forward_flops_per_token(run.config.model, length)
    said = cells(costs(points, 7200, "two cores"))
    assert said["all"] == f"{len(runs)} runs, {tokens:.3g} tokens, {flops:.3g} FLOPs of training"
    assert said["here"] == "about 2.0 hours, two cores"
    for device, peak in (("A100", 312), ("H100", 989), ("v5e", 197)):
        hours = flops / (0.4 * peak * 1e12) / 3600
        assert said[device] == f"{hours:,.0f} hours at 40% of {peak} TFLOP/s, training alone"
    assert f"{max(map(memory_bytes, points)) / 1e9:,.2f} GB for a run of '62 x 384'" in said["memory"]
    assert cells(costs(points, None, "no device"))["here"] == "not known, no device"


def test_memory_is_that_of_state_and_activations_of_a_micro_batch():
    (point,) = points_of("configs/depth_vs_width.py:tiny", {"train.accumulation_steps": 2}, None, ["8 x 32"])
    c, counts = point.config, accounting.parameters(point.config.model)
    activations = accounting.activation_bytes(c.model, c.data.sequence_length, c.train.batch_size // 2)
    assert memory_bytes(point) == 16 * counts.total + activations  # weights, gradients and two moments


def test_seeds_that_a_margin_needs_are_the_fewest_with_enough_power():
    studies = ("depth_vs_width", "layer_sharing")
    points = [p for s in studies for p in points_of(f"configs/{s}.py:tiny", {}, None, (), ["completep"])]
    lines = [line for line in costs(points, 1.0, "").splitlines() if line.startswith("seeds")]
    assert len(lines) == 2
    for study, line in zip(("depth_vs_width", "layer_sharing"), lines, strict=True):
        facts = next(point.facts for point in points if point.facts["study"] == study)
        sd, pairs, margin = facts["plan"]["sd"], facts["plan"]["pairs"], facts["margin"]
        needed = next(n for n in range(2, 100) if power_of_equivalence(sd, n, pairs, margin) >= 0.8)
        assert line == (
            f"seeds   {study}:tiny: 5 planned; equality within {margin:g} needs about {needed} "
            f"(sd {sd:g}, {pairs} pairs, power 80%)"
        )


def test_small_models_and_searches_are_told():
    points = points_of("configs/playground.py:tiny", {}, None, ())
    said = cells(costs(points, 374, "here"))
    assert said["all"].startswith(f"about {sum(point.runs for point in points)} runs, ")
    assert said["here"] == "about 6 minutes, here"
    assert said["H100"] == (
        "under a minute at 40% of 989 TFLOP/s, training alone; models this small take several times as long"
    )


def test_a_listing_ends_with_the_costs():
    result = command("experiments.sweep", "--config=configs/depth_vs_width.py:tiny", "--list", "--jobs=1")
    assert result.returncode == 0, result.stderr
    said = cells(result.stdout.partition("\n\n")[2])
    assert re.match(r"about \S+ (minutes|hours), points side by side: 1, by the rate of", said["here"])
