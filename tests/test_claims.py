"""The page of claims: what the paper's tables say, what the records say, and the judgement."""

import dataclasses
import importlib
import math
from fnmatch import fnmatchcase

import numpy as np
import pytest
from test_results import make_diverged, make_record

from experiments.reporting import claims, judging, paper_tables
from experiments.runner.studies import points_of
from mobilellm_jax.analysis.facts import have_base_shape
from mobilellm_jax.analysis.study import study_of


@pytest.mark.parametrize(
    ("sides", "of_all", "of_any"),
    [
        (["for"], "agree", "agree"),
        (["open", "for"], "cannot tell", "agree"),
        (["against", "open"], "disagree", "cannot tell"),
        (["against", "for"], "disagree", "agree"),
        (["open"], "cannot tell", "cannot tell"),
        (["for", "for"], "agree", "agree"),
        (["against", "against"], "disagree", "disagree"),
        ([], "cannot tell", "cannot tell"),
    ],
)
def test_claims_about_all_pairs_and_about_one(sides, of_all, of_any):
    assert (judging.judge(sides, "all"), judging.judge(sides, "any")) == (of_all, of_any)


def two_points(gap, spread, seeds=5, **changes):
    """A study of which 4 blocks are worse than 2 by `gap`, with sd `spread` of the difference."""
    noise = np.random.default_rng(0).normal(size=seeds)
    noise = spread * (noise - noise.mean()) / (noise.std(ddof=1) or 1)
    return study_of(
        [
            make_record(depth=depth, seed=seed, score=3.5 + (gap + noise[seed]) * (depth == 4), **changes)
            for depth in (2, 4)
            for seed in range(seeds)
        ]
    )


@pytest.mark.parametrize(
    ("gap", "spread", "word", "not_worse"),
    [
        (0.030, 0.003, "worse", "for"),  # shown to be there, and to be small
        (0.060, 0.003, "worse", "against"),
        (0.040, 0.020, "worse", "open"),  # 0.015 to 0.065, the margin within
        (-0.010, 0.030, "cannot tell", "for"),  # not shown to be better, but at most 0.027 worse
        (-0.060, 0.010, "better", "for"),
        (0.010, 0.060, "cannot tell", "open"),
        (0.000, 0.000, "no difference", "for"),
    ],
)
def test_as_well_is_non_inferiority(gap, spread, word, not_worse):
    study = two_points(gap, spread, margin=0.04)
    (c,) = study.verdict.comparisons
    low, high = c.difference.low, c.difference.high
    assert c.word == word
    assert judging.side(c, "not worse") == not_worse
    assert judging.side(c, "better") == {"better": "for", "worse": "against"}.get(word, "open")
    assert judging.side(c, "worse") == {"worse": "for", "better": "against"}.get(word, "open")
    gains = {"worse": "for", "no difference": "for", "better": "against"}
    assert judging.side(c, "not better") == gains.get(word, "open")
    if low is not None:
        assert not_worse == ("for" if high < 0.04 else "against" if low > 0.04 else "open")


def test_seeds_that_survive_do_not_show_that_nothing_is_lost():
    for depth, gap, whole in ((4, -0.01, "for"), (2, 0.06, "against")):
        study = two_points(gap, 0.003, margin=0.04)
        gone = [make_diverged(depth=depth, seed=5, margin=0.04)]
        survived = study_of([*study.runs, *gone])
        assert judging.side(study.verdict.comparisons[0], "not worse") == whole
        assert judging.side(survived.verdict.comparisons[0], "not worse") == "open"


def shapes(scores, **changes):
    """Points of these (blocks, width) -> score, each deeper one compared with the first."""
    labels = [f"{depth} x {width}" for depth, width in scores]
    runs = []
    for index, ((depth, width), score) in enumerate(scores.items()):
        for seed in range(4):
            run = make_record(
                depth=depth,
                point=labels[index],
                point_index=index,
                seed=seed,
                score=score + 0.002 * seed * index,
                pairs=[[label, labels[0]] for label in labels[1:]],
                study="depth_vs_width",
                overrides={"model.depth": depth, "model.width": width},
                **changes,
            )
            config = {**run.config, "model": {**run.config["model"], "width": width}}
            runs.append(dataclasses.replace(run, config=config))
    return study_of(runs)


DEPTH = claims.CLAIMS[0]


def under_both(study):
    """The same runs once more, as those of a second arm."""
    runs = []
    for place, end in enumerate(("", " (standard)")):
        runs += [
            dataclasses.replace(
                run,
                point=run.point + end,
                point_index=run.point_index + place * len(study.points),
                design=run.point,
                arm=("completep", "standard")[place],
                pairs=[[a + end, b + end] for a, b in run.pairs],
            )
            for run in study.runs
        ]
    return study_of(runs)


def test_at_the_base_shape_one_parameterization_is_all_of_them():
    claim = dataclasses.replace(DEPTH, pairs=(("2 x 128", "4 x 128"),), needs="all", in_range=False)
    plain = shapes({(4, 128): 3.8, (2, 128): 3.5})
    assert judging.judgement(claim, plain).word == "cannot tell"
    runs = [
        dataclasses.replace(
            run, layer_plan=[0, 1], config={**run.config, "model": {**run.config["model"], **base}}
        )
        for run in plain.runs
        for base in [{"depth": 2, "base_depth": 2, "base_width": 128}]
    ]
    assert have_base_shape(study_of(runs).points)
    assert judging.judgement(claim, study_of(runs)).word == "agree"


def test_depth_has_an_optimum_that_its_far_end_does_not_contradict():
    def word(scores):
        one, found = (judging.judgement(DEPTH, s) for s in (shapes(scores), under_both(shapes(scores))))
        assert one is not None
        assert found is not None
        assert one.word == "cannot tell"  # under one parameterization alone
        assert set(one.by_arm.values()) == {found.word}
        assert [c.point for c in found.outside] == [far, f"{far} (standard)"]
        return found.word

    far = "9 x 32"  # 3.6, outside of the paper's 6 to 320
    assert word({(1, 96): 3.5, (3, 64): 3.4, (5, 48): 3.6, (9, 32): 3.8}) == "agree"
    assert word({(1, 96): 3.5, (3, 64): 3.5, (5, 48): 3.5, (9, 32): 3.8}) == "cannot tell"
    assert word({(1, 96): 3.5, (3, 64): 3.6, (5, 48): 3.7, (9, 32): 3.2}) == "disagree"
    assert word({(1, 96): 3.5, (9, 32): 3.2}) == "cannot tell"
    text = claims.page([shapes({(1, 96): 3.5, (3, 64): 3.6, (9, 32): 3.8})])
    assert "3 x 64 against 1 x 96: +0.1" in section(text, DEPTH.text)
    assert "Not counted, of shapes that the paper does not cover: 9 x 32 against" in section(text, DEPTH.text)


@pytest.mark.parametrize(
    ("gaps", "word"),
    [((0.1, 0.2), "disagree"), ((-0.1, -0.2), "agree"), ((-0.1, 0.2), "cannot tell")],
)
def test_arms_have_to_agree(gaps, word):
    runs = []
    for index, (arm, gap) in enumerate(zip(("completep", "standard"), gaps, strict=True)):
        label = {"x1": "x1", "x2": "x2"} if index == 0 else {d: f"{d} ({arm})" for d in ("x1", "x2")}
        for place, design in enumerate(label):
            runs += [
                make_record(
                    depth=2 + place,
                    point=label[design],
                    point_index=2 * index + place,
                    design=design,
                    arm=arm,
                    seed=seed,
                    score=3.5 + gap * place + 0.002 * seed * (-1) ** place,
                    pairs=[[label["x2"], label["x1"]]],
                    overrides={"model.depth": 2 + place, "model.parameterization": arm},
                    scientific=["model.depth", "model.parameterization"],
                )
                for seed in range(4)
            ]
    claim = judging.Claim("Twice is better.", "", "shape", (("x2", "x1"),))
    found = judging.judgement(claim, study_of(runs))
    assert found is not None
    by_gap = {True: "disagree", False: "agree"}
    assert found.by_arm == {"completep": by_gap[gaps[0] > 0], "standard": by_gap[gaps[1] > 0]}
    assert found.word == word
    both = judging.Claim("Often is better.", "", "shape", (("x2", "x1"), ("x3", "x1")))
    missing = judging.judgement(both, study_of(runs))
    assert missing is not None
    assert missing.word == ("disagree" if word == "disagree" else "cannot tell")  # x3 has no records


def test_counted_shapes_that_the_paper_does_not_cover_are_named():
    runs = [
        make_record(depth=depth, point=label, seed=seed, pairs=[["x2", "x1"]], study="repeats")
        for depth, label in ((16, "x1"), (32, "x2"))
        for seed in range(3)
    ]
    again = section(
        claims.page([study_of(runs)]),
        "Applying every block two to four times in a row is better than once.",
    )
    assert "Width over layers outside of the paper's 6 to 320: x2 4." in again  # 128 / 32; x1 has 8


def test_the_same_runs_are_not_counted_twice():
    """Nor are those whose rates differ as each study fitted its own, or whose configs lack later fields."""

    def repeated(study, labels, rate, **later):
        runs = [
            make_record(
                depth=depth,
                point=label,
                seed=seed,
                score=3.5 + 0.1 * depth + 0.003 * seed * (depth - 3),
                pairs=[[labels[1], labels[0]]],
                study=study,
                learning_rate=rate,
            )
            for depth, label in zip((2, 4), labels, strict=True)
            for seed in range(3)
        ]
        for run in runs:
            run.config["model"] |= later
        return study_of(runs)

    again = repeated("repeats", ["x1", "x2"], 0.0162, loop_gains=False)
    text = claims.page([repeated("layer_sharing", ["none", "immediate"], 0.0161), again])
    first = section(text, "Every order of applying blocks twice is better than once.")
    again = section(text, "Applying every block two to four times in a row is better than once.")
    assert "The same design" not in first
    assert (
        "The same design, data and seeds: 'x2' is 'immediate' of layer_sharing:tiny; 'x1' is 'none' of "
        "layer_sharing:tiny." in again
    )
    assert "judgements rest on: 1. 1 more compare the same designs" in text
    assert "no evidence of" not in claims.page([repeated("layer_sharing", ["none", "immediate"], 0.01)])


def test_sampling_error_of_the_paper_is_that_of_simulated_questions():
    row = paper_tables.table("table02_layer_sharing_strategy")[0]
    rng = np.random.default_rng(0)
    counts = {
        "ARC-e": 2376, "ARC-c": 1172, "BoolQ": 3270, "PIQA": 1838, "SIQA": 1954, "HellaSwag": 10042,
        "OBQA": 500, "WinoGrande": 1267,
    }  # fmt: skip
    simulated = [rng.binomial(n, float(row[task]) / 100, 4000) / n for task, n in counts.items()]
    error = paper_tables.sampling_error(row)
    assert error == pytest.approx(100 * np.std(np.mean(simulated, axis=0)), rel=0.04)
    assert 0.6 < math.sqrt(2) * error < 0.66
    assert paper_tables.sampling_error({**row, "PIQA": ""}) is None


def test_star_where_architecture_cannot_be_judged():
    runs = [*two_points(0.1, 0.003, study="layer_sharing").runs]
    blind = [dataclasses.replace(run, floor={**run.floor, "trigram": 3.0}) for run in runs]
    changes = {"4 x 128": "immediate", "2 x 128": "none"}
    for star, records in (("tiny |", runs), ("tiny\\* |", blind)):
        named = [
            dataclasses.replace(run, point=changes[run.point], pairs=[["immediate", "none"]])
            for run in records
        ]
        text = claims.page([under_both(study_of(named))])
        (row,) = [line for line in text.splitlines() if line.startswith("| Every order")]
        assert row == f"| Every order of applying blocks twice is better than once. |  | {star}  |"
        assert ("architecture cannot be judged at that size" in text) == (records is blind)
        assert "n-gram floor" not in text
        old = study_of([dataclasses.replace(run, floor=None) for run in named])
        assert "For 1 of the 1 studies the n-gram floor was not counted" in claims.page([old])


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text)
def test_the_study_of_a_claim_asks_about_its_pairs(claim, preset):
    if preset not in importlib.import_module(f"configs.{claim.study}").PRESETS:
        preset = "tiny"
    points = points_of(f"configs/{claim.study}.py:{preset}", {}, None, ())
    asked = [pair for point in points for pair in point.facts["pairs"]]
    for point, other in claim.pairs:
        assert [pair for pair in asked if fnmatchcase(pair[0], point) and fnmatchcase(pair[1], other)]


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text)
def test_the_paper_has_the_pairs_of_a_claim(claim):
    groups = [{row.label for row in rows} for rows in paper_tables.rows(claim.study).values()]
    pairs = claim.paper or claim.pairs
    assert pairs
    for pair in pairs:
        assert any({*pair} <= labels for labels in groups), pair


LABELS = {1: "untied", 2: "tied", 4: "tied, 2 more blocks"}


def three_seeds(depth, score, **changes):
    return [
        make_record(
            depth=depth,
            point=LABELS[depth],
            point_index=list(LABELS).index(depth),
            seed=seed,
            score=score + 0.001 * seed * depth,
            pairs=[["tied", "untied"], ["tied, 2 more blocks", "untied"]],
            **changes,
        )
        for seed in range(3)
    ]


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_page_says_what_paper_and_records_say():
    records = [
        run
        for depth, score in ((1, 3.5), (2, 3.3), (4, 3.6))
        for run in three_seeds(depth, score, study="embedding_sharing")
    ]
    text = claims.page([study_of(records)])
    tying = section(
        text,
        "Tying the embeddings saves a tenth of the parameters and costs little; "
        "spent on depth, what is saved makes up for it.",
    )
    # table 1 of the paper, by hand
    assert "125M: + emb-share 44.6 against Without emb-share 44.8 (-0.2 ± 0.6, within it), " in tying
    assert "+ emb-share, more depth 45.0 against Without emb-share 44.8 (+0.2 ± 0.6, within it)." in tying
    assert "- **cannot tell** at [tiny](reports/embedding_sharing-tiny.md)" in tying
    # It says "and", so one suffices; but under one parameterization that is no judgement of the shapes.
    assert "2.05 M tokens, 3 seeds, standard: disagree, and no other parameterization)" in tying
    assert "tied against untied: -0.1990" in tying
    assert "worse" in tying
    assert "Not run here." in section(text, "SwiGLU is better than ReLU.")
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(claims.CLAIMS)
    assert [row for row in rows if row.endswith("|  |  | tiny |")] == [rows[2 + 3]]
    only_tied = [run for run in records if run.x["value"] == 2]
    missing = claims.page([study_of(only_tied)])
    assert "- At tiny there are no records yet of the points it is about." in missing
    assert section(text, "Not tested here").count("- ") == len(claims.UNTESTED)
