"""The study of API calls: designs of equal size, and controls that are what they are called."""

import pytest

from configs import api_calls, base
from mobilellm_jax import data
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting


def designs(preset):
    labels = api_calls.study(preset).labels
    rows = zip(labels, api_calls.sweep(preset), strict=True)
    return {label: from_config_dict(base.update(api_calls.get_config(preset), row)) for label, row in rows}


def train_flops(config):
    per_token = accounting.train_flops_per_token(config.model, config.data.sequence_length)
    return per_token * config.train.steps * config.train.batch_size * config.data.sequence_length


def test_designs_have_equal_size_and_controls_are_what_they_are_called():
    found, study = designs("tiny"), api_calls.study("tiny")
    size = {label: accounting.parameters(config.model).non_embedding for label, config in found.items()}
    equal = [label for label in found if label not in study.controls or "FLOPs" in label]
    assert max(size[label] for label in equal) <= 1.02 * min(size[label] for label in equal)
    assert {label for pair in study.pairs for label in pair} == {*found}
    (twice,) = [label for label in study.controls if "FLOPs" not in label]
    (long,) = [label for label in study.controls if "FLOPs" in label]
    for config in found.values():
        if config.model.num_repeats == 2:
            assert found[twice].model.depth == config.model.effective_depth
            assert train_flops(found[long]) == pytest.approx(train_flops(config), rel=0.02)
    assert study.metric in MEASURES


@pytest.mark.parametrize("preset", ["paper_125m", "paper_350m"])
def test_paper_presets_have_the_paper_s_shapes(preset):
    (config,) = designs(preset).values()
    total = accounting.parameters(config.model).total
    assert total == {"paper_125m": 124_635_456, "paper_350m": 345_355_200}[preset]


def test_rows_of_the_tiny_study_hold_its_conversations(tmp_path):
    config = designs("tiny")["2 x 38"]
    fewer = base.update(
        api_calls.get_config("tiny"),
        {
            "data.source": config.data.source + ",conversations=1500",
            "data.valid_source": config.data.valid_source + ",conversations=300",
            "data.cache_dir": str(tmp_path),
        },
    )
    prepared = data.prepare(from_config_dict(fewer).data, config.model.vocab_size)
    for entry in prepared.card["splits"].values():
        assert entry["left_out"] == 0
        assert entry["cut"] <= 0.02 * entry["documents"]
