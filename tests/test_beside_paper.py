"""The paper beside our records: its numbers, typed here from the paper's tables, and what records show."""

import csv
import dataclasses
from itertools import pairwise

import pytest
from matplotlib.text import Text
from test_results import make_diverged, make_record

from experiments.reporting import beside_paper, paper_tables
from experiments.runner.studies import points_of
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.config import to_dict
from mobilellm_jax.errors import UserError

# Average accuracies as the paper prints them: figure 4, figure 3, table 2, figure 5 (heads: accuracies).
DEPTHS = {
    "125M": {4: 43.3, 6: 42.3, 8: 43.0, 12: 43.9, 18: 43.9, 24: 44.8, 30: 44.8, 42: 44.5, 62: 44.7},
    "350M": {
        5: 47.1,
        10: 48.6,
        12: 49.1,
        15: 48.7,
        19: 48.8,
        24: 49.4,
        28: 48.9,
        32: 49.8,
        46: 49.6,
        66: 49.5,
    },
}
STEPS = [42.6, 43.9, 44.8, 44.6, 45.0, 46.1], [47.4, 48.7, 49.8, 49.2, 49.9, 51.0]
SHARING = [44.6, 45.0, 45.2, 44.8], [49.6, 50.2, 50.7, 50.1]
HEADS_125M = {
    "32 heads": [44.3, 43.8, 44.2, 44.0, 43.0, 43.1],
    "16 heads": [44.6, 44.3, 44.7, 43.5, 43.7],
    "8 heads": [43.8, 44.0, 43.4, 43.8],
}


def twins(study, seeds=2, gain=0.05, **changes):
    """Returns records as the sweep of a study would leave them; each point is better than the one before."""
    return [
        make_record(
            seed=seed,
            score=3.8 - gain * point.facts["point_index"] + 0.004 * seed * (-1) ** point.facts["point_index"],
            **{
                **point.facts,
                "tuning": "none",
                "config": to_dict(point.config),
                "layer_plan": list(point.config.model.plan),
                **changes,
            },
        )
        for point in points_of(f"configs/{study}.py:tiny", {}, None, (), ("completep",))
        for seed in range(seeds)
    ]


def draw(records):
    figure = beside_paper.draw(study_of(records))
    assert figure is not None
    return figure


def panels(records):
    """Returns the axes of the paper, by size group, and our axes."""
    *theirs, ours = draw(records).axes
    return {title(axes).removeprefix("the paper").removeprefix(", "): axes for axes in theirs}, ours


def title(axes):
    return axes.get_title(loc="left").replace("\n", " ")


def stairs(axes):
    """The grey lines from one row to the next: (value, row) of both ends."""
    lines = [line.get_xydata() for line in axes.lines if line.get_color() == "0.5"]
    return [(tuple(line[0]), tuple(line[-1])) for line in lines]


def lines_with(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def test_paper_s_own_points_stand_beside_ours_though_their_number_differs():
    theirs, ours = panels(twins("depth_vs_width"))
    for group, accuracies in DEPTHS.items():
        (line,) = theirs[group].lines
        assert dict(zip(*line.get_data(), strict=True)) == accuracies
        assert theirs[group].get_xscale() == "log"
    assert theirs["350M"].get_xlabel() == ours.get_xlabel() == "distinct blocks (depth)"
    means = [container[0].get_xydata()[0].tolist() for container in ours.containers]
    assert means == [
        [depth, pytest.approx(3.8 - 0.05 * i, abs=0.003)] for i, depth in enumerate((1, 2, 4, 8))
    ]
    assert len(lines_with(ours, ".")) == 4  # seeds
    assert ours.get_ylim()[0] > ours.get_ylim()[1]
    assert title(ours).endswith("axis reversed")


def test_both_groups_of_the_paper_have_one_scale():
    theirs, _ = panels(twins("layer_sharing"))
    assert [list(axes.lines[0].get_xdata()) for axes in theirs.values()] == [*SHARING]
    spans = [high - low for low, high in (axes.get_xlim() for axes in theirs.values())]
    assert spans[0] == pytest.approx(spans[1])
    assert [line.get_linestyle() for axes in theirs.values() for line in axes.lines] == ["None"] * 2


def test_roadmap_is_a_staircase_with_the_change_at_every_step():
    records = twins("roadmap", seeds=3)
    records[-1] = dataclasses.replace(records[-1], final={**records[-1].final, "loss": 3.9})
    theirs, ours = panels(records)
    for axes, accuracies in zip(theirs.values(), STEPS, strict=True):
        assert stairs(axes) == [*pairwise((value, row) for row, value in enumerate(accuracies))]
    changes = [text.get_text() for text in theirs["125M"].texts]
    assert changes == ["+1.3", "+0.9", "-0.2", "+0.4", "+1.1"]
    found = study_of(records).verdict.comparisons
    assert len(ours.texts) == len(found) == 5
    for place, (text, comparison) in enumerate(zip(ours.texts, found, strict=True), start=1):
        change, *word = text.get_text().split()
        assert float(change.rstrip(",")) == pytest.approx(comparison.difference.mean, rel=0.05)
        assert " ".join(word) == comparison.word
        assert text.xy[1] == place


def test_staircase_leaves_out_steps_of_which_a_point_is_missing():
    theirs, ours = panels([r for r in twins("roadmap") if r.point != "+ deep and thin"])
    assert len(theirs["125M"].texts) == 5
    assert [(start[1], end[1]) for start, end in stairs(ours)] == [(0, 1), (2, 3), (3, 4)]
    assert [text.xy[1] for text in ours.texts] == [1, 3, 4]
    theirs, ours = panels([r for r in twins("roadmap") if r.point == "+ SwiGLU"])
    assert (len(theirs["350M"].texts), len(ours.texts)) == (5, 0)


def test_heads_are_lines_over_key_value_heads_on_both_sides():
    theirs, ours = panels(twins("head_groups"))
    lines = theirs["125M"].lines[:3]
    assert [list(line.get_ydata()) for line in lines] == list(HEADS_125M.values())
    assert list(lines[0].get_xdata()) == [32, 16, 8, 4, 2, 1]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 3
    assert [text.get_text() for text in ours.texts if text.get_text()] == list(HEADS_125M)
    for line, mark in zip(lines, ours.lines[-3:], strict=True):
        assert (line.get_color(), line.get_marker()) == (mark.get_color(), mark.get_marker())
    colors = [container[0].get_color() for container in ours.containers]
    assert colors == [lines[0].get_color()] * 6 + [lines[1].get_color()] * 5 + [lines[2].get_color()] * 4
    assert {container[0].get_xdata()[0] for container in ours.containers} == {1, 2, 4, 8, 16, 32}


def test_caption_says_what_both_sides_are():
    caption = draw(twins("repeats")).texts[0].get_text().replace("\n", " ")
    assert caption.startswith(
        "The paper (table 14): average zero-shot accuracy on eight tasks after 0.25T training tokens, one "
        "run of each model at one learning rate. Ours: 750 k non-embedding parameters; 2.05 M training "
        "tokens in 500 steps; data: bundled of Python 3.11.7. Held equal:"
    )
    assert "after 1T training tokens" in draw(twins("mobilellm")).texts[0].get_text().replace("\n", " ")


def test_our_points_are_categories_where_the_paper_s_are():
    """Also of records that had places on an x axis."""
    x = {"label": "times", "log": True}
    records = [
        dataclasses.replace(r, x={**x, "value": r.point_index + 1}) for r in twins("repeats", seeds=3)[:12]
    ]
    labels = [tick.get_text() for tick in draw(records).axes[-1].get_yticklabels()]
    assert labels == ["x1", "x2", "x3", "x4"]


def test_missing_records_are_told_and_the_rest_is_drawn():
    records = [r for r in twins("layer_sharing", seeds=3) if r.point != "immediate"]
    records = [r for r in records if (r.point, r.seed) != ("reverse", 2)]
    figure = draw(records)
    assert [tick.get_text() for tick in figure.axes[-1].get_yticklabels()] == [
        "none",
        "repeat_all",
        "reverse",
        "6 blocks",
        "none, equal FLOPs",
    ]
    caption = figure.texts[0].get_text().replace("\n", " ")
    warnings = study_of(records).verdict.warnings
    assert "'immediate' has no finished run: it is not compared." in warnings
    assert caption.endswith(f"Warning: {warnings[0]} And {len(warnings) - 1} more warnings, in the report.")
    assert "of 2 to 3 seeds" in title(figure.axes[-1])


def test_other_code_is_told_before_all_else_and_other_data_refused():
    records = twins("layer_sharing", seeds=1)
    other = dataclasses.replace(records[0], git_commit="fedcba9")
    caption = draw([other, *records[1:]]).texts[0].get_text()
    assert caption.split("Warning: ")[1].startswith("The runs differ in git commit: fedcba9 (1 runs)")
    other = dataclasses.replace(records[0], data={**records[0].data, "source_sha256": "ef" * 32})
    with pytest.raises(UserError, match="source_sha256 of the data"):
        draw([other, *records[1:]])


def test_study_of_which_nothing_finished_is_drawn():
    changes = [(r.point, r.point_index, r.pairs) for r in twins("embedding_sharing", seeds=1)]
    records = [
        make_diverged(study="embedding_sharing", point=p, point_index=i, pairs=pairs, x=None)
        for p, i, pairs in changes
    ]
    _, ours = panels(records)
    assert "no run finished" in title(ours)
    assert [text.get_text() for text in ours.texts] == ["1 of 1 diverged"] * 3


@pytest.mark.parametrize("study", ["khop", "followups"])
def test_study_without_accuracies_in_the_paper_has_neither_picture_nor_table(study):
    other = study_of([make_record(study=study, pairs=[])])
    assert beside_paper.draw(other) is None
    assert beside_paper.table(other) == {}
    assert beside_paper.csv_text(other) == ""


@pytest.mark.parametrize("study", ["roadmap", "mobilellm", "head_groups"])
def test_all_text_fits(study):
    figure = draw(twins(study))
    figure.set_dpi(150)
    figure.draw_without_rendering()
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    for axes in figure.axes:
        for limits, labels in (
            (axes.get_xlim(), [(text, text.get_position()[0]) for text in axes.get_xticklabels()]),
            (axes.get_ylim(), [(text, text.get_position()[1]) for text in axes.get_yticklabels()]),
        ):  # further ticks are not drawn
            texts += [text for text, place in labels if min(limits) <= place <= max(limits)]
    texts += [text for axes in figure.axes for text in axes.get_children() if isinstance(text, Text)]
    for text in (text for text in texts if text.get_text()):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text


def test_table_has_our_points_and_the_paper_s_rows_below():
    study = study_of(twins("mobilellm", seeds=2))
    columns = beside_paper.table(study)
    assert columns["of"] == ["ours, tiny"] * 7 + ["paper"] * 7
    assert columns["parameters"][6:12] == ["1 M", "124.6 M", "124.6 M", "345.3 M", "345.3 M", "603.1 M"]
    assert columns["parameters"][12:] == ["1.0 B", "1.5 B"]
    assert columns["accuracy, %"] == [""] * 7 + ["46.3", "47.0", "51.3", "52.1", "54.3", "57.3", "59.4"]
    assert columns["seeds"] == ["2"] * 7 + [""] * 7
    assert columns["point"][6:8] == ["twin of MobileLLM-1.5B", "MobileLLM-125M"]
    rows = list(csv.DictReader(beside_paper.csv_text(study).splitlines()))
    assert [float(row["score_mean"]) for row in rows[7:]] == [
        e.mean for e in study.verdict.estimates.values()
    ]
    assert [row["accuracy"] for row in rows[:7]] == columns["accuracy, %"][7:]


def test_every_study_of_the_paper_has_accuracies():
    there = {study for study in paper_tables.SOURCES if beside_paper.accuracies(study)}
    assert there == set(paper_tables.SOURCES) - {"followups"}
