"""The playground: designs of equal size, controls that are what their names say, and all abilities."""

import dataclasses
import math
import re

import pytest
from test_results import make_record

from configs import base, playground
from experiments.reporting import abilities
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
    assert "reports/playground-knowledge_tiny.md" in page
    assert 20_000 < (tmp_path / "figures" / "playground-tiny.png").stat().st_size < 300_000


def test_one_ability_alone_has_no_page_of_all(tmp_path):
    structure, _ = studies()
    assert abilities.write([structure], tmp_path) == []
