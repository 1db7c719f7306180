"""Figures from synthetic records: what they show, and the same bytes twice."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from test_results import make_diverged, make_record, make_tuning

from experiments.reporting import drawing, figures, placing
from mobilellm_jax.analysis.answer import answer
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.analysis.wording import phrase

LOSSES = {2: 3.62, 4: 3.55, 8: 3.53, 16: 3.54}
PAIRS = [["4 x 128", "2 x 128"], ["8 x 128", "4 x 128"], ["16 x 128", "8 x 128"]]
JITTER = (0.0, 0.013, -0.008, 0.005, -0.011)


def depths(seeds: int = 3, tuned: bool = True, **changes):
    """A study with a numeric, logarithmic x axis; its tuning runs are far worse than the comparison."""
    changes = {"pairs": PAIRS, **changes}
    compared = [
        make_record(depth=depth, seed=seed, score=loss + JITTER[seed] * (1 + 0.3 * i), **changes)
        for i, (depth, loss) in enumerate(LOSSES.items())
        for seed in range(seeds)
    ]
    tuning = [run for depth in LOSSES for run in make_tuning(depth=depth, score=3.9, **changes)]
    return compared + (tuning if tuned else [])


def tasks(count: int = 4, seeds: int = 3, errors=(0.6, 0.15, 0.0, 0.0), **changes):
    """A study of a synthetic task with a categorical x axis."""
    names = ["none", "immediate", "repeat_all", "reverse", "0 1 2 1 2 3", "0 1 1 0", "0 0 1 1 2 2"][:count]
    return [
        make_record(
            study="khop",
            metric="error",
            seed=seed,
            score=error * (1 - JITTER[seed]),
            **{
                "point": name,
                "point_index": i,
                "x": None,
                "pairs": [[n, "none"] for n in names[1:]],
                **changes,
            },
        )
        for i, (name, error) in enumerate(zip(names, itertools.cycle(errors), strict=False))
        for seed in range(seeds)
    ]


def panels(records):
    """Returns the axes of the outcome: values, and effects where pairs are asked about."""
    return figures.outcome(study_of(records)).axes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def names(axes):
    """The names at the ends of lines."""
    return [text.replace("\n", " ") for text in texts(axes) if text]


def subtitle(figure):
    return figure.texts[2].get_text().replace("\n", " ")


def lines_with(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def size(figure):
    with Image.open(io.BytesIO(drawing.render(figure))) as image:
        return image.size


def test_values_show_means_intervals_and_every_seed_of_the_comparison_only():
    records = depths()
    values, _ = panels(records)
    assert values.get_xlabel() == "depth (layers)"
    assert values.get_ylabel() == "held-out loss (nats per token)"
    assert values.get_xscale() == "log"
    assert [tick.get_text() for tick in values.get_xticklabels()] == ["2", "4", "8", "16"]
    scores = {d: [r.score for r in records if r.phase == "comparison" and r.x["value"] == d] for d in LOSSES}
    means = [container[0].get_xydata()[0].tolist() for container in values.containers]
    assert means == [[d, pytest.approx(np.mean(s))] for d, s in scores.items()]
    bars = [container[2][0].get_segments()[0][:, 1] for container in values.containers]
    for (low, high), of_point in zip(bars, scores.values(), strict=True):
        expected = stats.t.interval(0.95, 2, loc=np.mean(of_point), scale=stats.sem(of_point))
        assert (low, high) == pytest.approx(expected)
    dots = [line.get_ydata().tolist() for line in lines_with(values, ".")]
    assert dots == list(scores.values())


def test_error_is_shown_as_exact_match():
    records = tasks()
    values, effects = panels(records)
    assert values.get_xlabel() == "exact match, held out (%)"
    dots = [list(line.get_xdata()) for line in lines_with(values, ".")]
    assert dots[1] == pytest.approx([100 * (1 - 0.15 * (1 - jitter)) for jitter in JITTER[:3]])
    assert dots[2] == [100, 100, 100]
    low, high = values.containers[1][2][0].get_segments()[0][:, 0]
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 2) * stats.sem(dots[1]))
    assert "first is better \N{RIGHTWARDS ARROW}" in effects.get_xlabel()
    left, right = effects.get_xlim()
    assert left > right  # fewer errors are to the right, as more right answers are above
    assert "difference in error (percentage points)" in effects.get_xlabel()
    means = [line.get_xdata()[0] for line in lines_with(effects, "o")]
    assert means[0] == pytest.approx(-45 * (1 - np.mean(JITTER[:3])))
    (span,) = effects.patches
    assert (span.get_x(), span.get_width()) == pytest.approx((-2, 4))  # the margin, 0.02


def test_no_tick_promises_more_than_all_answers():
    records = tasks()
    gone = {"point": "reverse", "point_index": 3, "x": None, "pairs": records[0].pairs, "study": "khop"}
    records[-1] = make_diverged(metric="error", seed=2, **gone)
    values, _ = panels(records)
    assert values.get_xlim()[1] > 100
    assert max(values.get_xticks()) <= 100


def test_no_interval_promises_more_than_all_answers():
    records = [
        make_record(metric="error", seed=seed, score=score, x=None, pairs=[])
        for seed, score in enumerate((0.0, 0.05))
    ]
    (values,) = panels(records)
    low, high = values.containers[0][2][0].get_segments()[0][:, 0]
    half = study_of(records).verdict.estimates["4 x 128"].half_width
    assert (low, high) == (pytest.approx(97.5 - 100 * half), 100)
    assert 0.1 < half < 0.5


def test_effects_have_a_row_for_each_pair():
    records = depths(seeds=5)
    study = study_of(records)
    found = study.verdict
    values, effects = figures.outcome(study).axes
    assert effects.get_ylim()[0] > effects.get_ylim()[1]  # the first pair at the top
    said = [text.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ") for text in texts(effects)]
    assert said[0] == "'4 x 128' is better than '2 x 128'"
    for line, c in zip(said, found.comparisons, strict=True):
        assert phrase(c, "loss").removeprefix(c.word) in line
        assert repr(c.point) in line
        assert repr(c.other) in line
    for row, (a, b) in enumerate([(4, 2), (8, 4), (16, 8)]):
        differences = [
            x.score - y.score
            for x in records
            for y in records
            if (x.x["value"], y.x["value"], x.seed, x.phase, y.phase)
            == (a, b, y.seed, "comparison", "comparison")
        ]
        interval = found.comparisons[row].difference
        drawn = [line.get_xdata() for line in effects.lines if list(line.get_ydata()) == [row, row]]
        assert drawn[0] == pytest.approx([interval.low, interval.high])
        marks = [line for line in effects.lines if list(line.get_ydata()) == [row]]
        assert marks[-1].get_xdata() == pytest.approx([np.mean(differences)])
        assert marks[-1].get_color() == drawing.WORDS[found.comparisons[row].word][0]
    assert {comparison.word for comparison in found.comparisons} >= {"better"}
    assert "held-out" in values.get_ylabel()
    title = figures.outcome(study).texts[1].get_text()
    assert title.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ") == answer(study)


def test_interval_much_wider_than_all_differences_is_cut_with_arrows():
    records = [
        make_record(depth=depth, seed=seed, score=score, tuning="none", pairs=PAIRS[:1], margin=0.0)
        for depth, scores in {2: (3.5, 3.7), 4: (3.69, 3.5)}.items()
        for seed, score in enumerate(scores)
    ]
    effects = panels(records)[1]
    (interval,) = [line.get_xdata() for line in effects.lines if list(line.get_ydata()) == [0, 0]]
    assert interval == pytest.approx([-0.02, 0.02])  # 4 times the difference of -0.005
    assert [line.get_marker() for line in effects.lines[2:4]] == ["<", ">"]


@pytest.mark.parametrize("seeds", [(0,), (5,)], ids=["one seed", "another seed"])
def test_pair_without_interval(seeds):
    records = [make_record(depth=2, seed=0, score=3.6, pairs=PAIRS[:1])]
    records += [make_record(depth=4, seed=seed, pairs=PAIRS[:1]) for seed in seeds]
    figure = figures.outcome(study_of(records))
    values, effects = figure.axes
    assert subtitle(figure).endswith(": no intervals: one seed")
    assert [container[2] for container in values.containers] == [()] * 2
    assert not [line for line in effects.lines if list(line.get_ydata()) == [0, 0]]
    assert len(lines_with(effects, "o")) == 1


def test_every_word_of_a_verdict_has_a_look():
    looks = {(color, marker, fill) for color, _, marker, fill in drawing.WORDS.values()}
    assert len(looks) == len(drawing.WORDS) == 4


def test_study_without_pairs_has_no_effect_plot():
    assert len(panels(depths(pairs=[]))) == 1


def test_runs_that_did_not_finish_are_marked():
    records = depths(seeds=3, tuned=False)
    records[-1] = make_diverged(depth=16, seed=2, pairs=PAIRS)
    records[:3] = [
        make_record(depth=2, seed=s, pairs=PAIRS, status="failed", error="killed", final=None)
        for s in range(3)
    ]
    values, _ = panels(records)
    assert [text.replace("\n", " ") for text in texts(values)] == ["3 of 3 failed", "1 of 3 diverged"]
    assert [line.get_xdata()[0] for line in lines_with(values, "x")] == [2, 16]
    labels = names(figures.curves(study_of(records)).axes[0])
    assert labels == ["2 x 128 (3 of 3 failed)", "4 x 128", "8 x 128", "16 x 128 (1 of 3 diverged)"]


def test_point_that_was_only_tuned_is_shown_as_absent():
    records = [r for r in depths() if r.phase == "tuning" or r.x["value"] != 16]
    values, _ = panels(records)
    assert texts(values) == ["no run"]
    assert values.get_xscale() == "log"
    assert names(figures.curves(study_of(records)).axes[0])[-1] == "16 x 128 (no run)"


def test_study_in_which_nothing_finished_is_drawn():
    records = [make_diverged(depth=d, pairs=PAIRS[:1]) for d in (2, 4)]
    assert subtitle(figures.outcome(study_of(records))).endswith("no run finished")
    assert size(figures.curves(study_of(records)))[0] == 735
    assert figures.learning_rates(study_of(records)) is None


def test_categories_stand_below_each_other_in_study_order():
    values = panels(tasks())[0]
    labels = [tick.get_text() for tick in values.get_yticklabels()]
    assert labels == ["none", "immediate", "repeat_all", "reverse"]
    assert values.get_ylim()[0] > values.get_ylim()[1]
    long = [make_record(point=f"{i} a name of many words", point_index=i, x=None, pairs=[]) for i in range(9)]
    assert panels(long)[0].get_yticklabels()[0].get_text() == "0 a name of many\nwords"


def test_points_at_the_same_place_are_drawn_as_categories():
    places = [{"label": "depth (layers)", "value": value, "log": True} for value in (2, 4, 4)]
    records = [make_record(depth=d, x=x, pairs=[]) for d, x in zip((2, 4, 8), places, strict=True)]
    values = panels(records)[0]
    assert [tick.get_text() for tick in values.get_yticklabels()] == ["2 x 128", "4 x 128", "8 x 128"]
    assert values.get_ylabel() == ""


def test_labels_of_many_close_values_do_not_collide():
    records = [make_record(depth=d, pairs=[]) for d in range(1, 21)]
    ticks = panels(records)[0].get_xticks()
    assert len(ticks) < 20
    assert (np.diff(np.log(ticks)) >= 0.054 * np.log(20) - 1e-9).all()


def test_lines_over_x_have_one_look_each_and_stand_beside_each_other():
    places = [(heads, kv) for heads in (8, 4) for kv in (1, 2, 4)]
    records = [
        make_record(
            point=f"{heads} x {kv}",
            point_index=i,
            x={"label": "key/value heads", "value": kv, "log": True, "series": f"{heads} heads"},
            pairs=[],
            seed=seed,
            score=3.5 + 0.01 * i + 0.001 * seed,
        )
        for i, (heads, kv) in enumerate(places)
        for seed in (0, 1)
    ]
    (values,) = panels(records)
    assert values.get_xlabel() == "key/value heads"
    assert names(values) == ["8 heads", "4 heads"]
    bars = [container[0] for container in values.containers]
    assert [bar.get_xdata()[0] for bar in bars] == [1, 2, 4, 1, 2, 4]
    looks = [(bar.get_color(), bar.get_marker()) for bar in bars]
    assert looks == [looks[0]] * 3 + [looks[3]] * 3
    assert looks[0] != looks[3]
    across = [bar.get_transform().transform(bar.get_xydata()[0])[0] for bar in bars]
    assert across[0] < across[3] < across[1] < across[4]
    joined = [line.get_xydata().tolist() for line in values.lines if len(line.get_xdata()) == 2]
    means = [bar.get_xydata()[0].tolist() for bar in bars]
    assert [means[0], means[1]] in joined
    assert [means[2], means[3]] not in joined


def test_costs_show_size_and_training_flops_of_a_run():
    records = [
        dataclasses.replace(
            run,
            parameters={**run.parameters, "non_embedding": 100_000 * run.x["value"]},
            budgets={**run.budgets, "train_flops_per_token": 2e5 * run.x["value"]},
        )
        for run in depths(seeds=2)
    ]
    figure = figures.costs(study_of(records))
    sizes, flops = figure.axes
    assert (sizes.get_xlabel(), flops.get_xlabel()) == ("non-embedding parameters", "training FLOPs of a run")
    assert sizes.get_ylabel() == "held-out loss (nats per token)"
    for axes, unit in ((sizes, 100_000), (flops, 2e5 * 2_048_000)):
        means = [container[0].get_xydata()[0] for container in axes.containers]
        assert [x / unit for x, _ in means] == pytest.approx([2, 4, 8, 16])
        assert [y for _, y in means] == pytest.approx(
            [e.mean for e in study_of(records).verdict.estimates.values()]
        )
    assert names(sizes) == names(flops) == [f"{depth} x 128" for depth in LOSSES]
    assert "of 2 seeds" in subtitle(figure)
    title = figure.texts[1].get_text().replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")
    front = "'2 x 128', '4 x 128' and '8 x 128'"  # 16 x 128 is larger and worse than 8 x 128
    assert title == f"{front} have the best mean for their non-embedding parameters and training FLOPs"


def test_costs_that_are_equal_are_left_out_and_points_of_equal_cost_stand_side_by_side():
    records = tasks(count=3)
    records = [
        dataclasses.replace(
            r, budgets={**r.budgets, "train_flops_per_token": 1e6 if r.point == "none" else 2e6}
        )
        for r in records
    ]
    figure = figures.costs(study_of(records))
    (flops,) = figure.axes
    assert flops.get_xlabel() == "training FLOPs of a run"
    bars = [container[0] for container in flops.containers]
    across = [bar.get_transform().transform(bar.get_xydata()[0])[0] for bar in bars]
    apart = across[2] - across[1]
    assert 10 < apart < 0.1 * (across[1] - across[0])
    assert subtitle(figure).endswith("Designs at nearly the same x are drawn a little apart.")


def test_intervals_of_points_moved_aside_are_not_cut_off():
    records = [
        make_record(point=name, point_index=i, seed=seed, score=3.5 + 0.1 * seed, x=None, pairs=[])
        for i, name in enumerate("abc")
        for seed in (0, 1)
    ]
    records[:2] = [
        dataclasses.replace(r, parameters={**r.parameters, "non_embedding": 1_500_000}) for r in records[:2]
    ]
    (sizes,) = figures.costs(study_of(records)).axes
    ends = [end for bar in sizes.containers for end in bar[2][0].get_segments()[0][:, 1]]
    assert max(ends) - min(ends) > 1
    assert sizes.get_ylim()[0] < min(ends) < max(ends) < sizes.get_ylim()[1]


def test_costs_that_do_not_differ_are_not_drawn():
    records = tasks()
    assert figures.costs(study_of(records)) is None
    alone = depths(pairs=[])[:3]
    assert figures.costs(study_of(alone)) is None


def test_curves_are_means_over_seeds_against_tokens():
    records = depths()
    figure = figures.curves(study_of(records))
    (axes,) = figure.axes
    thick = [line for line in axes.lines if not line.get_label().startswith("_")]
    thin = [line for line in axes.lines if line.get_label().startswith("_") and len(line.get_xdata()) > 1]
    assert names(axes) == ["2 x 128", "4 x 128", "8 x 128", "16 x 128"]
    assert len(thin) == 12  # tuning runs are not among them
    assert thick[0].get_xdata()[-1] == records[0].tokens_seen
    assert thick[0].get_ydata()[-1] == pytest.approx(3.62 + np.mean(JITTER[:3]))
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in thick}
    assert len(looks) == len({marker for _, marker, _ in looks}) == 4


def test_learning_rates_show_what_was_tried_chosen_and_lost():
    records = [r for d in (2, 4) for r in make_tuning(depth=d, best=2e-3, score=3.6, pairs=PAIRS[:1])]
    records += [
        make_record(depth=d, seed=s, learning_rate=1e-3, pairs=PAIRS[:1]) for d in (2, 4) for s in (0, 1)
    ]
    figure = figures.learning_rates(study_of(records))
    (axes,) = figure.axes
    first = next(line for line in axes.lines if line.get_label() == "2 x 128")
    assert first.get_xdata() == pytest.approx([0.0005, 0.001, 0.002, 0.004])
    assert first.get_ydata() == pytest.approx([3.72, 3.63, 3.6, 3.63])
    rings = [line for line in axes.lines if line.get_markersize() == 14]
    assert [line.get_xydata()[0].tolist() for line in rings] == [[0.001, pytest.approx(3.63)]] * 2
    crosses = lines_with(axes, "x")
    assert [line.get_xdata()[0] for line in crosses] == [0.008, 0.008]
    assert crosses[0].get_ydata()[0] != crosses[1].get_ydata()[0]  # the second does not hide the first
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "0.0005",
        "0.001",
        "0.002",
        "0.004",
        "0.008",
    ]


def test_rates_on_the_grid_are_powers_of_two():
    records = [*make_tuning(best=2**-7.5, pairs=[]), make_record(learning_rate=2**-7.5, pairs=[])]
    (axes,) = figures.learning_rates(study_of(records)).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "2⁻⁹·⁵",
        "2⁻⁸·⁵",
        "2⁻⁷·⁵",
        "2⁻⁶·⁵",
        "2⁻⁵·⁵",
    ]


@pytest.mark.parametrize("ends", [[0.5] * 9, [0, 0.01, 0.02, 1, 1], [*np.linspace(0, 1, 30)]])
def test_names_at_the_ends_of_lines_do_not_hide_each_other(ends):
    half = {str(i): 0.02 + 0.01 * (i % 3 == 0) for i in range(len(ends))}
    put = placing.spread({str(i): end for i, end in enumerate(ends)}, half)
    order = sorted(put, key=put.get)
    assert order == sorted(order, key=lambda name: ends[int(name)])  # none crosses another
    for a, b in itertools.pairwise(order):
        assert put[b] - put[a] >= half[a] + half[b] - 1e-9
    alone = placing.spread({"a": 0.2, "b": 0.8}, {"a": 0.02, "b": 0.02})
    assert alone == {"a": pytest.approx(0.2), "b": pytest.approx(0.8)}


def test_names_stand_beside_the_ends_of_their_lines():
    figure = figures.curves(study_of(depths()))
    (axes,) = figure.axes
    figure.draw_without_rendering()
    for name in axes.texts:
        if name.get_text():
            (line,) = [line for line in axes.lines if line.get_label() == name.get_text()]
            end = axes.transData.transform(line.get_xydata()[-1])[1]
            assert abs(name.get_window_extent().get_points()[:, 1].mean() - end) < 40  # pixels, of four names


def test_rate_that_was_not_tried_has_no_ring():
    records = [*make_tuning(pairs=[]), make_record(learning_rate=3e-3, pairs=[])]
    axes = figures.learning_rates(study_of(records)).axes[0]
    assert not [line for line in axes.lines if line.get_markersize() == 14]


def test_rate_that_learned_nothing_does_not_squeeze_the_others():
    records = [
        *make_tuning(score=3.6, pairs=[]),
        make_record(learning_rate=1e-1, phase="tuning", score=7.5, pairs=[]),
    ]
    axes = figures.learning_rates(study_of(records)).axes[0]
    assert axes.get_ylim()[1] < 5


def test_many_points_and_long_names_fit():
    names = [f"{i:02d} repeat_all 0 1 2 3 0 1 2 3 with a long name" for i in range(18)]
    changes = [
        {"point": name, "point_index": i, "x": None, "pairs": [[name, names[0]] for name in names[1:6]]}
        for i, name in enumerate(names)
    ]
    records = [make_record(seed=s, score=3.5 + 0.01 * s, **c) for c in changes for s in range(2)]
    records += [make_diverged(phase="tuning", **c) for c in changes]
    study = study_of(records)
    drawn = figures.outcome(study), figures.curves(study_of(records)), figures.learning_rates(study)
    for figure in drawn:
        figure.set_dpi(150)
        figure.draw_without_rendering()
        texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
        texts += [text for axes in figure.axes for text in axes.get_yticklabels()]
        for axes in figure.axes:
            left, right = sorted(axes.get_xlim())  # further ticks are not drawn
            texts += [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
        for box in (text.get_window_extent() for text in texts if text.get_text()):
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height


def test_warnings_stand_in_the_figure():
    caption = figures.outcome(study_of(depths(seeds=1))).texts[0].get_text()
    assert "Warning: One seed proves nothing" in caption
    study = study_of(depths())
    found = dataclasses.replace(study.verdict, warnings=[f"This is number {i}." for i in range(9)])
    lines = figures.outcome(dataclasses.replace(study, verdict=found)).texts[0].get_text().splitlines()
    assert lines[-2:] == ["Warning: This is number 0.", "And 8 more warnings, in the report."]


def test_caption_states_the_scale():
    records = depths()
    caption = figures.outcome(study_of(records)).texts[0].get_text().replace("\n", " ")
    assert caption == (
        "750 k non-embedding parameters; 2.05 M training tokens in 500 steps; data: bundled of Python "
        "3.11.7. Held equal: non-embedding parameters, within 0.1%. Learning rate: tuned for each point. "
        "Smallest difference that matters: 0.02 nats per token."
    )


def test_same_records_give_the_same_small_figure():
    records = depths(seeds=2)
    once, again = (drawing.render(figures.outcome(study_of(r))) for r in (records, records[::-1]))
    assert once == again
    assert len(once) < 150_000
