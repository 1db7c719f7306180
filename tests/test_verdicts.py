"""What verdicts say about records: words, learning rates, failures, warnings, and what they refuse."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from test_results import SETTINGS, make_diverged, make_record, make_tuning

from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.facts import facts_of
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.analysis.tuning import Tuning
from mobilellm_jax.analysis.wording import format_p, phrase
from mobilellm_jax.errors import UserError

NOISE = np.random.default_rng(3).normal(0, 0.01, (8, 8))  # [point, seed]
LOSSES = {2: 3.6, 4: 3.5, 8: 3.501}
TRANSFERRED = (
    "The learning rate was not tuned, but comes from other shapes, sizes or horizons: what its error costs "
    "is not in the intervals."
)
PAIRS = [["4 x 128", "2 x 128"], ["8 x 128", "2 x 128"], ["8 x 128", "4 x 128"]]


def study(losses=LOSSES, seeds=5, **changes):
    """Returns tuning and comparison runs of points with these mean losses; seeds have an effect in common."""
    changes = {"pairs": PAIRS, **changes}
    return [
        run
        for i, (depth, loss) in enumerate(losses.items())
        for run in [
            *make_tuning(depth=depth, score=loss, **changes),
            *(
                make_record(depth=depth, seed=seed, score=loss + 0.05 * seed + NOISE[i, seed], **changes)
                for seed in range(seeds)
            ),
        ]
    ]


def only(records, phase):
    return [record for record in records if record.phase == phase]


def replace(records, new):
    """Returns the records with `new` in place of the run of the same point, phase and seed."""
    where = [(r.point, r.phase, r.seed) for r in records].index((new.point, new.phase, new.seed))
    return [*records[:where], new, *records[where + 1 :]]


def phrases(found):
    return [phrase(comparison, "loss") for comparison in found.comparisons]


def verdict(records):
    return study_of(records).verdict


def warnings_of(records):
    return check_comparable(facts_of(records), records)


def test_every_pair_is_compared_over_seeds_at_the_tuned_rates():
    records = study()
    found = verdict(records)
    loss = {
        d: [r.score for r in only(records, "comparison") if r.setting("model.depth") == d] for d in LOSSES
    }
    assert [(c.point, c.other) for c in found.comparisons] == [tuple(pair) for pair in PAIRS]
    assert [c.word for c in found.comparisons] == ["better", "better", "cannot tell"]
    assert found.spread.paired  # the seeds have an effect in common
    differences = {pair: np.subtract(loss[pair[0]], loss[pair[1]]) for pair in ((4, 2), (8, 2), (8, 4))}
    for c, of_seed in zip(found.comparisons, differences.values(), strict=True):
        assert c.difference.mean == pytest.approx(np.mean(of_seed))
        assert c.difference.low < c.difference.mean < c.difference.high
        assert (c.p_value < 0.05) == (c.word != "cannot tell")
    assert phrases(found) == ["better", "better", "cannot tell with 5 seeds"]
    assert [e.mean for e in found.estimates.values()] == pytest.approx([np.mean(v) for v in loss.values()])
    assert found.noise["2 x 128"] == pytest.approx(np.std(loss[2], ddof=1))
    assert found.warnings == []


def test_sentence_says_who_is_better_and_who_cannot_be_told_apart():
    found = verdict(study())
    by = [f"by {abs(c.difference.mean):.4f}, p {format_p(c.p_value)}" for c in found.comparisons]
    assert found.sentence.startswith(
        f"'4 x 128' is better than '2 x 128' ({by[0]}). '8 x 128' is better than '2 x 128' ({by[1]}). "
        "Cannot tell with 5 seeds: '8 x 128' and '4 x 128'. "
        "Differences are in nats per token, p and intervals hold for all 3 pairs at once. "
        f"Seeds correlate by {found.spread.correlation:.2f} over points: their common effect is removed. "
        f"With the pooled sd {found.spread.sd:.4f} ["
    )
    seeds = found.families[0].seeds
    assert f"equality within 0.02 takes about {seeds[0]} seeds ({seeds[1]} to {seeds[2]})." in found.sentence
    assert found.sentence.endswith("Seeds change initialisation and data order.")


def test_order_of_a_pair_does_not_change_who_is_better():
    there, back = (verdict(study(pairs=[pair])) for pair in (PAIRS[0], PAIRS[0][::-1]))
    assert [found.comparisons[0].word for found in (there, back)] == ["better", "worse"]
    assert there.sentence == back.sentence


def test_no_difference_is_bounded_and_a_small_one_is_named_as_such():
    wide = verdict(study({4: 3.5, 8: 3.5}, pairs=[PAIRS[2]], margin=0.1))
    difference = wide.comparisons[0].difference
    bound = max(abs(difference.low), abs(difference.high))  # one pair: the interval shown
    assert bound <= float(phrases(wide)[0].removeprefix("no difference larger than ")) <= 1.1 * bound
    assert wide.sentence.startswith("No difference larger than 0.0")
    small = verdict(study(pairs=[PAIRS[0]], margin=1.0))
    assert small.comparisons[0].word == "better"
    assert phrases(small)[0].startswith("better, but by no more than 0.1")
    assert ", but by no more than 0.1" in small.sentence


def test_many_pairs_are_counted_and_not_listed():
    losses = {1: 4.0, 2: 3.6, 3: 3.55, 4: 3.5, 5: 3.501, 6: 3.502, 7: 3.499, 8: 3.501}
    labels = [f"{depth} x 128" for depth in losses]
    found = verdict(study(losses, pairs=[list(pair) for pair in itertools.combinations(labels, 2)]))
    words = Counter(c.word for c in found.comparisons)
    assert (words["better"] + words["worse"], words["cannot tell"]) == (18, 10)
    assert found.sentence.startswith(
        "Of 28 pairs 18 differ and 10 cannot be told apart: see the table. Differences are in nats per token"
    )
    assert "'1 x 128'" not in found.sentence


def test_error_is_counted_in_points_of_exact_match():
    pairs, errors = [PAIRS[0]], {2: (0.5, 0.55, 0.58), 4: (0.1, 0.12, 0.11)}
    records = [
        make_record(depth=d, seed=seed, score=value, metric="error", pairs=pairs, tuning="transferred")
        for d, values in errors.items()
        for seed, value in enumerate(values)
    ]
    found = verdict(records)
    assert found.sentence == (
        f"'4 x 128' is better than '2 x 128' (by 43.33, p {format_p(found.comparisons[0].p_value)}). "
        "Differences are in percentage points of exact match. "
        f"Seeds correlate by {found.spread.correlation:.2f} over points: not paired. "
        "Seeds change initialisation and data order."
    )
    assert found.warnings == [TRANSFERRED]


def test_task_that_all_points_solve():
    records = [make_record(depth=d, seed=s, score=0.0, metric="error") for d in (2, 4) for s in range(3)]
    found = verdict(records)
    assert phrases(found) == ["no difference in any of 3 seeds"]
    assert found.warnings[0] == (
        "The same difference in every seed: '4 x 128' and '2 x 128'. Either the error is saturated, or the "
        "seeds have no effect."
    )


def test_same_computation_under_two_names():
    found = verdict([make_record(depth=d, seed=s, score=3.5 + s) for d in (2, 4) for s in range(3)])
    assert phrases(found) == ["no difference in any of 3 seeds"]
    assert "Either both are one computation, or the seeds have no effect" in found.warnings[0]


def test_constant_difference_of_three_seeds_is_none_found():
    records = [make_record(depth=d, seed=s, score=d / 8, metric="error") for d in (2, 4) for s in range(3)]
    assert phrases(verdict(records)) == ["cannot tell with 3 seeds"]


def test_few_seeds_are_warned_of():
    one, two, three = (verdict(study(seeds=seeds)) for seeds in (1, 2, 3))
    assert set(phrases(one)) == {"cannot tell with 1 seed (needs at least 2)"}
    assert one.warnings == ["One seed proves nothing: all points."]
    assert two.warnings == ["Intervals from two seeds are very wide: all points."]
    assert three.warnings == []
    assert one.noise == dict.fromkeys(one.estimates)
    mixed = [r for r in study() if r.point != "2 x 128" or r.seed < 2]
    assert "Intervals from two seeds are very wide: '2 x 128'." in verdict(mixed).warnings


def test_seeds_that_differ_are_flagged_and_only_common_ones_compared():
    records = [r for r in study({2: 3.6, 4: 3.5}, pairs=[PAIRS[0]]) if (r.point, r.seed) != ("2 x 128", 3)]
    found = verdict(records)
    assert found.comparisons[0].difference.n == 4
    assert not found.spread.paired  # two points and four seeds cannot show that it pays
    assert found.warnings == ["'2 x 128' has no finished run with seed 3, unlike other points."]
    assert found.failures.startswith("1 of 10 comparison runs left no record: '2 x 128' seed 3.")
    apart = [make_record(depth=2, seed=0), make_record(depth=4, seed=1, score=9.0)]
    found = verdict(apart)
    assert phrases(found) == ["cannot tell with 1 seed (needs at least 2)"]
    warnings = found.warnings
    for point, seed in (("2 x 128", 1), ("4 x 128", 0)):
        assert any(w.startswith(f"{point!r} has no finished run with seed {seed},") for w in warnings)


def test_equal_seeds_with_different_data_are_not_paired():
    records = study()
    odd = with_setting("train.data_seed", 77, depth=4, seed=3, score=3.5, pairs=PAIRS)
    assert verdict(replace(records, odd)).warnings == [
        "Runs with equal seed saw the data in different orders (seeds 3): not paired."
    ]


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        (set(), "nothing"),
        ({"init_seed"}, "initialisation"),
        ({"data_seed"}, "data order"),
        ({"init_seed", "data_seed"}, "initialisation and data order"),
    ],
    ids=["nothing", "initialisation", "order", "both"],
)
def test_what_the_seeds_vary_is_said(varied, said):
    records = []
    for record in study():
        train = {**record.config["train"], **dict.fromkeys({"init_seed", "data_seed"} - varied, 0)}
        records.append(dataclasses.replace(record, config={**record.config, "train": train}))
    found = verdict(records)
    assert found.seeds_vary == said
    assert found.sentence.endswith(f"Seeds change {said}.") == (said != "nothing")


# --- failures -------------------------------------------------------------------------------------------


def test_runs_that_did_not_finish_are_counted_in_both_phases():
    records = study({2: 3.6, 4: 3.5, 8: 3.7}, seeds=3)
    records = replace(records, make_diverged(depth=2, seed=0, pairs=PAIRS))
    lost = {"status": "failed", "error": "out of memory", "final": None}
    records = replace(records, make_record(depth=4, seed=1, pairs=PAIRS, **lost))
    del records[-1]
    found = verdict(records)
    of_comparison = (
        "1 of 9 comparison runs diverged: '2 x 128' seed 0. 1 of 9 comparison runs failed: '4 x 128' seed 1. "
        "1 of 9 comparison runs left no record: '8 x 128' seed 2."
    )
    assert found.sentence.endswith(of_comparison)
    assert found.failures == (
        f"{of_comparison} 3 of 15 tuning runs diverged: '2 x 128' seed 0 at 0.008, "
        "'4 x 128' seed 0 at 0.008, '8 x 128' seed 0 at 0.008."
    )
    assert {point: e.n for point, e in found.estimates.items()} == dict.fromkeys(found.estimates, 2)
    assert found.comparisons[0].difference.seeds == (2, 2)  # not the same ones


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[0][::-1]], ids=["point", "other"])
def test_seeds_that_survive_say_nothing_in_favour_of_a_point_that_diverged(pair):
    records = study({2: 3.6, 4: 3.5}, pairs=[pair], seeds=8)
    assert verdict(records).comparisons[0].word in ("better", "worse")
    better_diverged = verdict(replace(records, make_diverged(depth=4, seed=3, pairs=[pair])))
    assert phrases(better_diverged) == ["cannot tell with 7 seeds ('4 x 128' diverged)"]
    assert better_diverged.comparisons[0].not_worse is None
    flattered = (
        "'4 x 128' diverged with 1 of 8 seeds. The seeds that survived flatter it, so that nothing is "
        "concluded in its favour."
    )
    assert flattered in better_diverged.warnings
    worse_diverged = verdict(replace(records, make_diverged(depth=2, seed=3, pairs=[pair])))
    assert worse_diverged.comparisons[0].word == verdict(records).comparisons[0].word
    equal = study({2: 3.6, 4: 3.6}, pairs=[pair], margin=0.1, seeds=8)
    assert verdict(equal).comparisons[0].word == "no difference"
    found = verdict(replace(equal, make_diverged(depth=2, seed=3, pairs=[pair], margin=0.1)))
    assert phrases(found) == ["cannot tell with 7 seeds ('2 x 128' diverged)"]


def test_point_that_always_diverges():
    records = only(study({4: 3.5}, pairs=[PAIRS[0]]), "comparison")
    found = verdict([*records, *(make_diverged(depth=2, seed=s, pairs=[PAIRS[0]]) for s in range(5))])
    assert phrases(found) == ["cannot tell without finished runs"]
    assert list(found.estimates) == ["4 x 128"]
    assert "'2 x 128' has no finished run: it is not compared." in found.warnings
    alone = verdict([record for record in study() if record.point == "8 x 128"])
    assert "'4 x 128' and '2 x 128' have no finished run: they are not compared." in alone.warnings
    assert "'2 x 128' diverged with every seed: no comparison shows how bad it is" in " ".join(found.warnings)


def test_verdict_before_any_comparison_finished():
    found = verdict(only(study({2: 3.6, 4: 3.5}), "tuning"))
    assert found.sentence == (
        "No comparison run finished. Best learning rates: 0.002 for '2 x 128', 0.002 for '4 x 128'."
    )
    assert (found.estimates, found.noise) == ({}, {})
    assert set(phrases(found)) == {"cannot tell without finished runs"}
    gone = verdict([make_diverged(depth=2, seed=seed) for seed in range(2)])
    assert gone.sentence == (
        "No comparison run finished. 2 of 2 comparison runs diverged: '2 x 128' seed 0, '2 x 128' seed 1."
    )


def test_study_without_pairs():
    found = verdict(study(pairs=[]))
    assert found.sentence.startswith(
        "No comparison was asked for. Mean loss in nats per token: '2 x 128' 3.69"
    )
    assert found.comparisons == []


def test_verdict_is_of_one_study():
    with pytest.raises(ValueError, match="one study and preset"):
        verdict([make_record(), make_record(preset="small")])


# --- arms, plan, unstable runs --------------------------------------------------------------------------


def arms(losses, **changes):
    """Records of designs in two arms, from (mean loss by design) by arm; pairs are within an arm."""
    records, labels = [], {"standard": "{}", "completep": "{} (completep)"}
    for place, (arm, of_arm) in enumerate(losses.items()):
        a, b = (labels[arm].format(design) for design in of_arm)
        for index, (design, loss) in enumerate(of_arm.items()):
            for seed in range(5):
                made = make_record(
                    depth=int(design[0]),
                    seed=seed,
                    score=loss + NOISE[2 * place + index, seed],
                    **{"pairs": [[a, b]], "margin": 0.05, **changes},
                )
                config = {**made.config, "model": {**made.config["model"], "parameterization": arm}}
                records.append(
                    dataclasses.replace(
                        made,
                        point=labels[arm].format(design),
                        point_index=2 * place + index,
                        design=design,
                        arm=arm,
                        config=config,
                        overrides={**made.overrides, "model.parameterization": arm},
                    )
                )
    return records


def test_an_undecided_arm_leaves_the_pair_undecided():
    records = arms(
        {"standard": {"8 x 128": 3.8, "4 x 128": 3.5}, "completep": {"8 x 128": 3.52, "4 x 128": 3.5}}
    )
    lone = [run for run in records if run.arm == "standard" or run.seed == 0]
    found = verdict(lone)
    assert [pair.word for pair in found.joint] == ["cannot tell"]
    said = "Cannot tell under both parameterizations: '8 x 128' and '4 x 128' (worse under standard alone)."
    assert found.sentence.startswith(said)


@pytest.mark.parametrize(
    ("standard", "completep", "word", "begins"),
    [
        (
            3.8,
            3.7,
            "worse",
            "'4 x 128' is better than '8 x 128' under both parameterizations (standard: by 0.",
        ),
        (3.5, 3.5, "no difference", "No difference larger than 0.0"),
        (
            3.8,
            3.5,
            "depends on the parameterization",
            "It depends on the parameterization: '8 x 128' against '4 x 128': worse under standard, "
            "no difference larger than 0.0",
        ),
    ],
)
def test_architecture_is_spoken_of_only_where_all_arms_agree(standard, completep, word, begins):
    found = verdict(
        arms(
            {
                "standard": {"8 x 128": standard, "4 x 128": 3.5},
                "completep": {"8 x 128": completep, "4 x 128": 3.5},
            }
        )
    )
    (pair,) = found.joint
    assert (pair.design, pair.other, pair.word) == ("8 x 128", "4 x 128", word)
    assert found.sentence.startswith(begins)
    assert [family.arm for family in found.families] == ["standard", "completep"]
    # A family of its own: one pair each.
    assert [len(family.comparisons) for family in found.families] == [1, 1]


def test_one_arm_alone_is_said_so():
    found = verdict(arms({"completep": {"8 x 128": 3.8, "4 x 128": 3.5}}))
    assert found.joint == []
    assert found.sentence.startswith(
        "Under completep alone: '4 x 128 (completep)' is better than '8 x 128 (completep)'"
    )


def test_more_seeds_than_planned_are_judged_by_a_confidence_sequence():
    plan = {"seeds": 5, "pairs": 1, "sd": None, "power": None, "control": False}
    found = {n: verdict(study({2: 3.5, 4: 3.5}, seeds=n, pairs=[PAIRS[0]], plan=plan)) for n in (5, 8)}
    assert found[5].families[0].planned is None
    assert found[8].families[0].planned == 5
    assert "There are more seeds than the 5 planned" not in found[5].sentence
    assert "There are more seeds than the 5 planned" in found[8].sentence
    fixed = verdict(study({2: 3.5, 4: 3.5}, seeds=8, pairs=[PAIRS[0]])).comparisons[0].difference
    assert found[8].comparisons[0].difference.low < fixed.low


@pytest.mark.parametrize(
    ("power", "said"), [(0.29, "of 29%:"), (0.002, "of less than 1%:"), (0.9, ""), (None, "")]
)
def test_a_plan_that_could_not_show_equality_is_said(power, said):
    plan = {"seeds": 5, "pairs": 1, "sd": 0.02, "power": power, "control": False}
    found = verdict(study({2: 3.5, 4: 3.5}, pairs=[PAIRS[0]], margin=1e-4, plan=plan))
    assert [c.word for c in found.comparisons] == ["cannot tell"]
    assert ("By the plan" in found.sentence) == bool(said)
    assert said in found.sentence


def test_a_comparison_off_the_fitted_rate_is_said():
    """A study that went on after its first comparisons fits the rates again, to more runs."""
    rates = (0.0023, 0.0026)  # the parabola of `make_tuning` has its minimum at 0.002
    for rate, octaves in zip(rates, ("+0.20", "+0.38"), strict=True):
        records = [
            dataclasses.replace(r, tuning="fitted", nuisance=["optimizer.learning_rate"])
            for r in study({2: 3.6, 4: 3.5}, pairs=[PAIRS[0]])
        ]
        assert not any("another rate" in warning for warning in verdict(records).warnings)
        records = [
            r
            if r.phase == "tuning"
            else dataclasses.replace(
                r, config=r.config | {"optimizer": {**r.config["optimizer"], "learning_rate": rate}}
            )
            for r in records
        ]
        assert any(f"by {octaves} octaves" in warning for warning in verdict(records).warnings)


def test_unstable_runs_are_counted_and_stay():
    records = study({2: 3.6, 4: 3.5}, pairs=[PAIRS[0]])
    quiet = [
        dataclasses.replace(r, final={**r.final, "loss": 3.5 + 0.01 * r.seed})
        if r.phase == "comparison"
        else r
        for r in records
    ]
    quiet = [dataclasses.replace(r, evaluations=[r.final]) if r.phase == "comparison" else r for r in quiet]
    assert verdict(quiet).unstable == {}
    high = {"final": {**quiet[-1].final, "loss": 3.9}}
    found = verdict([*quiet[:-1], dataclasses.replace(quiet[-1], **high, evaluations=[high["final"]])])
    assert found.unstable == {"4 x 128": [4]}
    assert found.estimates["4 x 128"].n == 5
    assert any(
        w.startswith("Unstable: 1 of 5 runs of '4 x 128' (seed 4) ended far above") for w in found.warnings
    )
    was_better = [{**quiet[-1].final, "loss": 3.2}, quiet[-1].final]
    risen = [*quiet[:-1], dataclasses.replace(quiet[-1], evaluations=was_better)]
    assert verdict(risen).unstable == {"4 x 128": [4]}


# --- learning rates -------------------------------------------------------------------------------------


def search(values: dict[float, float | str], chosen: float | None = None) -> tuple[Tuning, list[str]]:
    """Returns the search of a point with these losses by rate, or how its run ended, and the warnings."""
    runs = []
    for rate, value in values.items():
        of_rate = {"learning_rate": rate, "phase": "tuning", "pairs": []}
        if value == "failed":
            runs.append(make_record(status="failed", error="out of memory", final=None, **of_rate))
        elif value == "diverged":
            runs.append(make_diverged(**of_rate))
        else:
            runs.append(make_record(score=value, metric="error" if value < 1 else "loss", **of_rate))
    metric = "error" if any(value != str(value) and value < 1 for value in values.values()) else "loss"
    runs = [dataclasses.replace(run, metric=metric) for run in runs]
    if chosen:
        runs += [
            make_record(seed=s, learning_rate=chosen, pairs=[], metric=metric, score=0.5) for s in range(3)
        ]
    found = verdict(runs)
    return found.tuning["4 x 128"], found.warnings


def test_search_is_read_from_the_tuning_runs():
    tuned, warnings = search({0.004: 3.6, 0.001: 3.7, 0.002: 3.5}, chosen=0.002)
    assert tuned.curve == [(0.001, 3.7), (0.002, 3.5), (0.004, 3.6)]
    assert (tuned.chosen, tuned.best, tuned.at_edge) == (0.002, 0.002, False)
    assert tuned.sensitivity == pytest.approx(0.15)
    assert warnings == []
    before, _ = search({0.004: 3.6, 0.001: 3.7, 0.002: 3.5})
    assert before.chosen == 0.002
    assert verdict([make_record()]).tuning == {}


@pytest.mark.parametrize(
    ("values", "at_edge", "sensitivity"),
    [
        ({1e-3: 3.5, 2e-3: 3.6}, True, 0.1),
        ({1e-3: 3.6, 2e-3: 3.5}, True, 0.1),
        ({1e-3: 3.5}, True, None),
        ({1e-3: 3.6, 2e-3: 3.5, 4e-3: "diverged"}, False, math.inf),
        ({1e-3: 3.6, 2e-3: 3.5, 4e-3: "failed"}, True, 0.1),
        ({1e-3: 3.6, 2e-3: 3.5, 4e-3: "failed", 8e-3: 3.7}, False, 0.15),
        ({1e-3: 3.6, 2e-3: 3.5, 4e-3: 3.5}, True, 0.05),
    ],
    ids=["low", "high", "single", "diverged", "failed", "failed inside", "plateau"],
)
def test_optimum_at_the_edge_is_flagged(values, at_edge, sensitivity):
    tuned, warnings = search(values)
    assert tuned.at_edge == at_edge
    assert any("'4 x 128' lies at the edge of those tried" in warning for warning in warnings) == at_edge
    assert tuned.sensitivity == (sensitivity if sensitivity is None else pytest.approx(sensitivity))


def test_search_in_which_everything_diverged():
    tuned, warnings = search({1e-3: "diverged", 2e-3: "diverged"})
    assert tuned.curve == [(1e-3, None), (2e-3, None)]
    assert math.isnan(tuned.chosen)
    assert (tuned.best, tuned.at_edge, tuned.sensitivity) == (None, True, None)
    assert len(warnings) == 1


def test_rate_that_is_not_the_best_tried_is_flagged():
    tuned, warnings = search({1e-3: 3.6, 2e-3: 3.5, 4e-3: 3.6}, chosen=4e-3)
    assert (tuned.chosen, tuned.best) == (4e-3, 2e-3)
    assert warnings == ["'4 x 128' was compared at learning rate 0.004, but 0.002 was better in tuning."]


def test_of_equally_good_rates_any_may_be_chosen():
    tuned, warnings = search({5e-4: 3.6, 1e-3: 3.5, 2e-3: 3.5, 4e-3: 3.6}, chosen=2e-3)
    assert (tuned.chosen, tuned.best) == (2e-3, 2e-3)
    assert not any("better in tuning" in warning for warning in warnings)


def test_rates_that_were_not_tuned_are_flagged():
    records = only(study(tuning="none"), "comparison")
    assert verdict(records).warnings == [
        "The learning rate was not tuned: a point that looks better may only suit the given rate better."
    ]
    partly = [r for r in study() if r.phase == "comparison" or r.point == "2 x 128"]
    assert verdict(partly).warnings == [
        "No tuning run was made for '4 x 128' and '8 x 128': the learning rate may not suit it."
    ]
    assert verdict(only(study(tuning="transferred"), "comparison")).warnings == [TRANSFERRED]


# --- budgets --------------------------------------------------------------------------------------------


def test_mismatch_of_every_budget_is_told_and_of_the_matched_one_warned_of():
    found = verdict(study())
    assert found.mismatch["kv_cache_bytes_per_token"] == 3.0
    assert found.mismatch["embedding_parameters"] == 0.0
    assert found.mismatch["non_embedding_parameters"] == pytest.approx(6 / 750_002)
    assert list(found.mismatch) == list(make_record().budgets)
    records = study()
    records = [
        dataclasses.replace(
            r, budgets={**r.budgets, "non_embedding_parameters": 780_000, "activation_bytes": 0}
        )
        if r.point == "4 x 128"
        else r
        for r in records
    ]
    found = verdict(records)
    assert found.mismatch["activation_bytes"] == math.inf
    assert found.warnings == [
        "The points were to have equal non-embedding parameters, but differ by up to 4.0%: that may decide "
        "instead of what is compared."
    ]


# --- what may be compared -------------------------------------------------------------------------------


def with_setting(name: str, value: object, **changes):
    group, field = name.split(".")
    record = make_record(**changes)
    config = {**record.config, group: {**record.config[group], field: value}}
    return dataclasses.replace(record, config=config)


def test_held_out_documents_that_were_trained_on_are_a_warning():
    leaky = {"held_out_documents_in_train": 3, "splits": {"valid": {"documents": 40}}}
    warning = "3 of 40 held-out documents (7.5%) are in the training text as well."
    for data, expected in (({}, []), (leaky, [warning])):
        records = [make_record(seed=seed) for seed in range(3)]
        records = [dataclasses.replace(record, data={**record.data, **data}) for record in records]
        assert [text for text in warnings_of(records) if "held-out" in text] == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            make_record(
                seed=1,
                data={
                    "source": "bundled",
                    "python_version": "3.13.0",
                    "source_sha256": "other",
                    "tokenizer_sha256": "cd" * 32,
                },
            ),
            r"source_sha256 of the data is abab.* in '4 x 128' seed 0 \(bundled of Python 3\.11\.7\), "
            r"but other in '4 x 128' seed 1 \(bundled of Python 3\.13\.0\)",
        ),
        (
            make_record(seed=1, data={"source_sha256": "ab" * 32, "tokenizer_sha256": None}),
            "tokenizer_sha256",
        ),
        (
            make_record(phase="tuning", data={"source_sha256": "ab" * 32, "tokenizer_sha256": None}),
            "tokenizer_sha256",
        ),
        (make_record(seed=1, steps=499), "steps is 500 in .* but 499 in"),
        (make_record(seed=1, tokens_seen=7), "tokens seen is 2048000 in .* but 7 in"),
        (make_record(seed=1, metric="error", score=0.1), "metric is loss in .* but error in"),
        (with_setting("data.sequence_length", 512, seed=1), "data.sequence_length is 256 in .* but 512 in"),
        (with_setting("train.batch_size", 8, seed=1), "train.batch_size is 16 in .* but 8 in"),
        (with_setting("train.steps", 9, seed=1), "train.steps is 500 in .* but 9 in"),
        (with_setting("train.eval_rows", 64, seed=1), "train.eval_rows is 0 in .* but 64 in"),
        (make_record(), "2 records of '4 x 128' seed 0; delete all but one"),
        (make_record(seed=1, overrides={"model.depth": 5}), "the design of '4 x 128' is"),
        (
            make_record(seed=1, learning_rate=4e-3),
            "optimizer.learning_rate of the comparison runs of '4 x 128' is 0.002 in .* but 0.004 in",
        ),
    ],
    ids=[
        "source",
        "tokenizer",
        "tokenizer of tuning",
        "steps",
        "tokens",
        "metric",
        "length",
        "batch",
        "config steps",
        "rows",
        "twice",
        "design",
        "rate",
    ],
)
def test_runs_under_unequal_conditions_are_refused(other, message):
    with pytest.raises(UserError, match=f"shape:tiny: {message}"):
        verdict([make_record(), other])


def test_tuning_run_made_twice_is_refused():
    runs = make_tuning()
    with pytest.raises(
        UserError,
        match=r"2 records of '4 x 128' seed 0 in tuning at optimizer\.learning_rate 0\.001; delete all",
    ):
        warnings_of([*runs, runs[1]])


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        (make_record(seed=1, git_commit=None), "git commit: 0123abc (1 runs), None (1 runs)"),
        (
            make_record(seed=1, device={"platform": "gpu", "kind": "H100", "count": 2}),
            "device: 1 x cpu (cpu) (1 runs), 2 x H100 (gpu) (1 runs)",
        ),
        (
            make_record(seed=1, versions={"python": "3.11.7", "jax": "0.11.0"}),
            "jax version: 0.10.2 (1 runs), 0.11.0",
        ),
        (make_record(seed=1, question="Why?"), "question: Does"),
        (make_record(seed=1, margin=0.5), "margin: 0.02 (1 runs), 0.5"),
        (make_record(seed=1, pairs=[]), "pairs: "),
        (make_record(seed=1, tuning="none"), "tuning: grid (1 runs), none"),
        (
            with_setting("optimizer.warmup_steps", 7, seed=1),
            "optimizer.warmup_steps: 50 (1 runs), 7",
        ),
    ],
    ids=["commit", "device", "jax", "question", "margin", "pairs", "tuning", "setting"],
)
def test_other_differences_are_warned_of(other, warning):
    (found,) = warnings_of([make_record(), other])
    assert found.startswith(f"The runs differ in {warning}")
    assert found in verdict([make_record(), other]).warnings


def test_rates_that_differ_though_not_tuned_are_warned_of():
    records = [make_record(tuning="none"), make_record(depth=2, learning_rate=1e-3, tuning="none")]
    (found,) = warnings_of(records)
    assert found == "The runs differ in optimizer.learning_rate: 0.002 (1 runs), 0.001 (1 runs)."
    assert warnings_of([dataclasses.replace(record, tuning="grid") for record in records]) == []


def test_rates_tuned_over_another_horizon_are_warned_of():
    short = [
        with_setting("train.steps", 100, steps=100, tokens_seen=9, learning_rate=rate, phase="tuning")
        for rate in (1e-3, 2e-3)
    ]
    assert warnings_of([make_record(), *short]) == [
        "train.steps was 100 in tuning, but 500 in the comparison.",
    ]


def test_tuning_on_documents_of_their_own_is_no_difference():
    compared = with_setting("train.eval_split", "valid")
    tuned = [
        with_setting("train.eval_split", "tuning", learning_rate=rate, phase="tuning")
        for rate in (1e-3, 2e-3)
    ]
    assert warnings_of([compared, *tuned]) == []
    other = with_setting("train.eval_split", "tuning", seed=1)
    with pytest.raises(UserError, match=r"train\.eval_split is valid in .*, but tuning in"):
        warnings_of([compared, other])


def test_records_without_a_split_are_compared_among_themselves_only():
    old = [make_record(seed=seed) for seed in (0, 1)]
    assert "eval_split" not in old[0].config["train"]
    assert warnings_of(old) == []
    with pytest.raises(UserError, match=r"train\.eval_split is not recorded in .*, but valid in"):
        warnings_of([*old, with_setting("train.eval_split", "valid", seed=2)])


def test_what_a_study_varies_is_neither_refused_nor_warned_of():
    depth_2 = make_record(depth=2)
    tuned = {"overrides": {**depth_2.overrides, "optimizer.learning_rate": 1e-3, "train.init_seed": 1}}
    records = [
        make_record(depth=2, learning_rate=1e-3),
        make_record(depth=2, seed=1, learning_rate=1e-3, **tuned),
        make_record(),
        *make_tuning(depth=2),
    ]
    assert warnings_of(records) == []
    horizon = {"scientific": ["train.steps"], "overrides": {"train.steps": 9}, "point": "short"}
    short = with_setting("train.steps", 9, steps=9, tokens_seen=9 * 16 * 256, created="2027", **horizon)
    assert warnings_of([make_record(scientific=["train.steps"]), short]) == []


def test_settings_of_the_fixture_are_compared():
    assert set(make_record().config) == {"model", *SETTINGS}


def used(label, *, depth=2, uses=1, steps=500, arm=None, seed=0):
    """A record of `depth` blocks that are each used `uses` times; FLOPs grow with the layers."""
    record = make_record(
        depth=depth,
        seed=seed,
        score=3.5 + 0.01 * seed,
        point=label + f" ({arm})" * (arm == "standard"),
        design=label if arm else None,
        arm=arm,
        pairs=[["twice", "once"]] if arm != "standard" else [["twice (standard)", "once (standard)"]],
        scientific=["model.depth", "model.sharing", "train.steps"],
        layer_plan=list(range(depth)) * uses,
    )
    model = {"sharing": "none" if uses == 1 else "repeat_all", "num_repeats": uses}
    config = {**record.config, "model": {**record.config["model"], **model}}
    config["train"] = {**config["train"], "steps": steps}
    budgets = {**record.budgets, "train_flops_per_token": 1e6 * depth * uses}
    return dataclasses.replace(record, config=config, budgets=budgets)


def test_sharing_without_its_controls_is_warned_of():
    """Blocks used twice beside those used once: the stack as deep, and the training as long, are missing."""

    def said(*more, arms=(None,)):
        runs = [used("once", arm=arm, seed=s) for arm in arms for s in range(3)]
        runs += [used("twice", uses=2, arm=arm, seed=s) for arm in arms for s in range(3)]
        return [w for w in verdict([*runs, *more]).warnings if "without sharing" in w]

    no_deep = (
        "No point without sharing has as many layers as 'twice': how near a repeat comes to a block of its "
        "own is not known."
    )
    no_long = (
        "No point without sharing has as many training FLOPs as 'twice': longer training may bring as much "
        "as a repeat."
    )
    deep, long = used("deep", depth=4), used("long", steps=1000)
    assert said() == [no_deep, no_long]
    assert said(arms=("completep", "standard")) == [no_deep, no_long]
    assert said(deep) == [no_long]
    assert said(long) == [no_deep]
    assert said(used("deeper", depth=6), used("longer", steps=1100)) == [no_deep, no_long]
    assert said(deep, long) == []
