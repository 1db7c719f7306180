"""The study of chat: starts of one size, parents that fit, and the commands that make them."""

import dataclasses
import shlex

import pytest

from configs import base, chat
from experiments import cli
from experiments.runner import needed
from experiments.runner.studies import points_of
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.lineage import _check_model


def parents(preset):
    """The config of every parent, as its command would train it, by directory."""
    found = {}
    for run, line in chat.study(preset).makes.items():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "experiments.train"]
        given = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
        assert given["workdir"] == run
        found[run] = from_config_dict(cli.load_config(given["config"])[2])
    return found


@pytest.mark.parametrize("preset", chat.PRESETS)
def test_every_point_fits_its_parent(preset):
    of_parents, study = parents(preset), chat.study(preset)
    configs = [from_config_dict(base.update(chat.get_config(preset), row)) for row in chat.sweep(preset)]
    assert len({accounting.parameters(config.model).total for config in configs}) == 1
    started = {config.train.init_from for config in configs} - {""}
    assert started == {*of_parents}
    for config in configs:
        if name := config.train.init_from:
            _check_model(name, of_parents[name].model, config)  # raises if it does not fit
    base_model, twice = (of_parents[name].model for name in of_parents)
    assert dataclasses.replace(twice, sharing="none", num_repeats=1) == base_model
    assert twice.effective_depth == 2 * base_model.effective_depth
    assert study.metric == "loss"


def test_a_parent_that_is_not_there_is_asked_for_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = points_of("configs/chat.py:tiny", {}, None, ())
    made = "python -m experiments.train --config=configs/teachers.py:chat --workdir=runs/chat_base"
    with pytest.raises(UserError) as error:
        needed.check(points)
    assert str(error.value) == f"train.init_from: runs/chat_base: no run found; make it first: {made}"
    assert [len(needed.missing([point])) for point in points] == [0, 1, 1, 1]
