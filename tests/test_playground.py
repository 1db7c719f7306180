"""The playground: designs of equal size, controls that are what their names say, and all abilities."""

import dataclasses
import math
import re

import pytest
from scipy import stats
from test_results import make_record

from configs import base, playground
from experiments.reporting import abilities, beside_text, evidence, figures, literature
from mobilellm_jax import data
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting

ABILITIES = sorted(set(playground.PRESETS) - set(playground.COLLECTIONS))


def designs(preset):
    """The config of every design, by label."""
    labels = playground.study(preset).labels
    rows = zip(labels, playground.sweep(preset), strict=True)
    return {label: from_config_dict(base.update(playground.get_config(preset), row)) for label, row in rows}


def train_flops(config):
    per_token = accounting.train_flops_per_token(config.model, config.data.sequence_length)
    return per_token * config.train.steps * config.train.batch_size * config.data.sequence_length


@pytest.mark.parametrize("preset", ABILITIES)
def test_designs_have_equal_size_and_controls_are_what_they_are_called(preset):
    found, study = designs(preset), playground.study(preset)
    size = {label: accounting.parameters(config.model).non_embedding for label, config in found.items()}
    equal = [label for label in found if label not in study.controls or "FLOPs" in label]
    assert max(size[label] for label in equal) <= 1.02 * min(size[label] for label in equal)
    assert all(6 <= found[label].model.width / found[label].model.depth <= 320 for label in equal)
    assert {label for pair in study.pairs for label in pair} == set(found)
    for shared in (label for label in found if found[label].model.num_repeats == 2):
        once = shared.rpartition(" ")[0]
        twice = next(
            o for pair in study.pairs for o in pair if pair[0] == shared and size[o] > 1.5 * size[once]
        )
        assert found[twice].model.depth == found[shared].model.effective_depth
        assert found[twice].model.width == found[shared].model.width
        long = found[f"{once}, equal FLOPs"]
        assert train_flops(long) == pytest.approx(train_flops(found[shared]), rel=0.01)
        assert long.model == found[once].model


@pytest.mark.parametrize("preset", ABILITIES)
def test_every_design_fits_its_task(preset):
    for config in designs(preset).values():
        prepared = data.prepare(config.data, config.model.vocab_size)
        assert prepared.card["vocab_size"] == config.model.vocab_size
        prepared.train.check_steps(config.train.steps, config.train.batch_size)


def record(ability, label, plan, value, seed, *, steps=100, sharing="none"):
    metric = playground._ABILITIES[f"{ability}_tiny"].metric
    run = make_record(score=1.0, seed=seed)
    final = {**run.final, metric: value}
    config = {**run.config, "model": {**run.config["model"], "sharing": sharing}}
    config["train"] = {**config["train"], "steps": steps}
    return dataclasses.replace(
        run,
        study="playground",
        preset=f"{ability}_tiny",
        point=label,
        point_index=["once", "thin", "twice", "long", "deep"].index(label),
        scientific=["model.depth", "train.steps"],
        metric=metric,
        margin=0.05,
        pairs=[[a, b] for a, b in PAIRS if a == label],
        config=config,
        layer_plan=plan,
        final=final,
        best=final,
        evaluations=[final],
    )


PAIRS = [("thin", "once"), ("twice", "once"), ("twice", "long"), ("twice", "deep")]
PLANS = {"once": [0, 1], "thin": [0, 1, 2], "twice": [0, 1, 0, 1], "long": [0, 1], "deep": [0, 1, 2, 3]}


def studies():
    """Applied twice, the distance to the grammar is a half, and as many facts are stored."""
    means = {
        "structure": {"once": -2.0, "thin": -2.4, "twice": -2.0 - math.log(2), "long": -2.7, "deep": -3.0},
        "knowledge": {"once": 0.4, "thin": 0.6, "twice": 0.4, "long": 0.1, "deep": 0.05},
    }
    for ability, of_design in means.items():
        yield study_of(
            [
                record(
                    ability,
                    label,
                    PLANS[label],
                    mean + 0.01 * math.sin(5 * seed + 1.7 * index),
                    seed,
                    steps=200 if label == "long" else 100,
                    sharing="repeat_all" if label == "twice" else "none",
                )
                for index, (label, mean) in enumerate(of_design.items())
                for seed in range(5)
            ]
        )


def test_abilities_stand_side_by_side_by_what_a_pair_is_about(tmp_path):
    columns = abilities.table(abilities.by_size(studies())["tiny"])
    assert list(columns) == ["comparison", "structure", "knowledge"]
    assert columns["comparison"] == [
        "more, thinner blocks",
        "2 blocks twice, repeat_all, against once",
        "2 blocks twice, repeat_all, against once, for as many FLOPs",
        "2 blocks twice, repeat_all, against 4 blocks once",
    ]
    assert re.match(r"better, 0\.(49|50|51) of the distance \[0\.4\d, 0\.5\d\]", columns["structure"][1])
    assert columns["knowledge"][0].startswith(("worse, -20.", "worse, -19."))
    assert columns["knowledge"][1].startswith("no difference over ")
    assert columns["knowledge"][2].startswith(("worse, -30.", "worse, -29."))


def test_no_figure_of_all_abilities_is_too_high_to_be_read(tmp_path, monkeypatch):
    """13 designs in five abilities made one of 4,312 pixels."""
    of_size, drawn = abilities.by_size(studies())["tiny"], {}

    def save(name, alt, figure, *_):
        drawn[name] = figure
        return figures.Image(name, alt, b"")

    monkeypatch.setattr(abilities, "draw", lambda part, title, marked: (list(part), title))
    monkeypatch.setattr(abilities.figures, "save", save)
    height = sum(map(abilities._height, of_size.values()))
    for most, expected in (
        (1.01 * height, {"x": (["structure", "knowledge"], "So")}),
        (0.99 * height, {"x": (["structure"], "So (1 of 2)"), "x-2": (["knowledge"], "So (2 of 2)")}),
    ):
        monkeypatch.setattr(abilities, "_MOST_INCHES", most)
        drawn.clear()
        images = abilities.save("x", of_size, "So", tmp_path)
        assert drawn == expected
        assert [image.name for image in images] == list(expected)
    assert [image.alt for image in images] == ["Every design in structure", "Every design in knowledge"]


def test_the_page_of_all_abilities_leads_to_each(tmp_path):
    (said,) = abilities.write(studies(), tmp_path)
    found = [
        "more, thinner blocks: better at structure; worse at knowledge.",
        "2 blocks twice, repeat_all, against once: better at structure; no difference in knowledge.",
        "2 blocks twice, repeat_all, against once, for as many FLOPs: worse at knowledge; no difference in "
        "structure.",
        "2 blocks twice, repeat_all, against 4 blocks once: worse at structure and knowledge.",
    ]
    assert said.splitlines()[2:-2] == [f"- {sentence}" for sentence in found]
    page = (tmp_path / "reports" / "playground-tiny.md").read_text()
    assert "../figures/playground-tiny.png" in page
    assert all(sentence in page for sentence in found)
    assert "- [knowledge](playground-knowledge_tiny.md)" in page
    assert page.splitlines()[2] == "More, thinner blocks: better at structure; worse at knowledge."
    assert 20_000 < (tmp_path / "figures" / "playground-tiny.png").stat().st_size < 300_000


def test_one_ability_alone_has_no_page_of_all(tmp_path):
    structure, _ = studies()
    assert abilities.write([structure], tmp_path) == []


def test_collections_hold_what_their_names_say():
    """The default sweep stays small; the others have all five abilities and three orders."""
    sizes = {size: [preset.partition("_")[0] for preset in of] for size, of in playground.COLLECTIONS.items()}
    five = ["structure", "manipulation", "knowledge", "hops", "breadth"]
    assert playground.PRESETS[0] == "tiny"
    assert sizes.pop("tiny") == five[:3]
    assert sizes.pop("paper") == five * 2
    assert sizes == dict.fromkeys(("tiny5", "laptop", "paper8x512", "paper12x768"), five)
    for preset in ("structure_tiny5", "knowledge_laptop"):
        shared = {c.model.sharing: c.model.plan for c in designs(preset).values() if c.model.num_repeats == 2}
        assert set(shared) == {"immediate", "repeat_all", "reverse"}
    depths = {c.model.depth for c in designs("hops_laptop").values() if c.model.num_repeats == 2}
    assert depths == {2, 4}
    for size, label in (("paper8x512", "8 x 512"), ("paper12x768", "12 x 768")):
        assert playground.study(f"breadth_{size}").baseline == label


# What others found.


def two_abilities(twice, long, thin):
    """Knowledge with these differences from once, of twice and of thin, and of twice from long."""
    means = {"once": 0.4, "thin": 0.4 + thin, "twice": 0.4 + twice, "long": 0.4 + twice - long, "deep": 0.1}
    return [
        study_of(
            [
                dataclasses.replace(
                    record(
                        ability,
                        label,
                        PLANS[label],
                        mean + 0.002 * math.sin(5 * seed + 1.7 * index),
                        seed,
                        steps=200 if label == "long" else 100,
                        sharing="repeat_all" if label == "twice" else "none",
                    ),
                    arm="completep",
                )
                for index, (label, mean) in enumerate(means.items())
                for seed in range(5)
            ]
        )
        for ability in ("knowledge", "manipulation")
    ]


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        # loops and bits, loops and manipulation, the same at equal FLOPs, depth and manipulation, and bits
        ((0.0, 0.0, 0.0), ["agree", "cannot tell", "agree", "cannot tell", "agree"]),
        ((-0.2, -0.2, -0.2), ["disagree", "agree", "disagree", "agree", "disagree"]),
        ((0.2, 0.2, 0.2), ["disagree", "disagree", "agree", "disagree", "disagree"]),
        ((-0.2, 0.02, -0.02), ["disagree", "agree", "agree", "agree", "agree"]),
    ],
)
def test_what_others_found_is_judged(differences, words):
    section = literature.section(two_abilities(*differences))
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): row[1:] for row in rows[1:]}
    assert found.pop("Deeper is better at equal parameters: structure.") == ["", "", " |"]
    columns = ("agree", "disagree", "cannot tell")
    judged = {
        text: [w for w, cell in zip(columns, cells, strict=True) if "tiny" in cell]
        for text, cells in found.items()
    }
    order = [f.text for f in literature.FINDINGS if f.text in judged]
    assert [judged[text] for text in order] == [[word] for word in words]
    assert "knowledge_tiny (completep alone)" in section
    assert "750 k non-embedding parameters, 2.05 M tokens, 5 seeds, completep alone" in section


def test_depth_is_judged_from_either_side():
    """A shallower design that is worse speaks for depth."""
    (knowledge, _) = two_abilities(0.0, 0.0, 0.2)
    c = knowledge.verdict.comparisons[0]
    assert (c.point, c.other, c.word) == ("thin", "once", "worse")
    finding = dataclasses.replace(literature.FINDINGS[3], ability="knowledge")
    turned = dataclasses.replace(c, point="once", other="thin")
    assert literature.judge(finding, [c], knowledge) == "disagree"
    assert literature.judge(finding, [turned], knowledge) == "agree"


# Beside text.


def text_study(means):
    runs = [
        dataclasses.replace(
            record("structure", label, PLANS[label], 3.0, seed, steps=200 if label == "long" else 100),
            study="shape_laws",
            preset="33k_2",
            metric="loss",
            final=(final := {"step": 100, "loss": mean + 0.01 * seed, "bits_per_byte": None, "error": None}),
            best=final,
            evaluations=[final],
        )
        for label, mean in means.items()
        for seed in range(3)
    ]
    return study_of(runs)


def test_an_ability_stands_beside_the_loss_on_text():
    """The design that trains longer is left out; the interval is scipy's."""
    (structure, _), means = studies(), {"once": 3.5, "thin": 3.4, "twice": 3.38, "deep": 3.2, "long": 1.0}
    (line,) = beside_text.lines({"structure": structure}, [text_study(means)])
    labels = ["once", "thin", "twice", "deep"]
    x = [structure.verdict.estimates[label].mean for label in labels]
    found = stats.pearsonr(x, [means[label] for label in labels])
    low, high = found.confidence_interval()
    assert line == (
        f"structure (log divergence) and the loss on text (33k_2): {found.statistic:+.2f} "
        f"[{low:+.2f}, {high:+.2f}] over 4 designs."
    )
    (line,) = beside_text.lines({"structure": structure}, [text_study({"once": 3.5, "thin": 3.4, "deep": 3})])
    assert line.endswith("(33k_2): 3 common designs, too few for a correlation (at least 4).")
    assert beside_text.lines({"structure": structure}, [structure]) == []
    nothing = text_study({"long": 3.5, "twice": 3.4})
    for run in nothing.runs:
        run.config["model"]["width"] += 1
    assert beside_text.lines({"structure": structure}, [nothing]) == []


def test_bits_stand_beside_those_of_the_paper():
    bits = {"bits": 3000.0, "bits_per_non_embedding_parameter": 0.75, "bits_per_parameter": 0.5}
    runs = [
        dataclasses.replace(run, final={**run.final, **{k: v * (1 + seed) for k, v in bits.items()}})
        for seed in range(2)
        for run in [record("knowledge", "once", [0, 1], 0.4, seed)]
    ]
    columns = evidence.bits(study_of(runs))
    assert [cells[0] for cells in columns.values()] == ["once", "4,500", "1.12", "0.75"]
    assert [cells[1] for cells in columns.values()] == ["paper", "", "2.00", "2.00"]
    assert evidence.bits(next(studies())) is None
