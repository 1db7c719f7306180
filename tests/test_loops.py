"""Other numbers of loops than in training, against loops over layers in NumPy."""

import jax
import numpy as np
import pytest
from conftest import random_params, tiny_model
from test_diagnostics import numpy_states
from test_model import _numpy_norm
from test_results import make_record

from experiments.reporting import loops as tables
from experiments.reporting import pages
from mobilellm_jax import model
from mobilellm_jax.analysis.loops import looped
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.model.loops import LoopedModel, with_repeats
from mobilellm_jax.model.parameterization import multipliers

SHAPE = {"parameterization": "completep", "base_depth": 3, "base_width": 24}
PLANS = {
    "immediate": (0, 0, 0, 1, 1, 1),
    "repeat_all": (0, 1, 0, 1, 0, 1),
    "reverse": (0, 1, 1, 0, 0, 1),
}


@pytest.mark.parametrize("sharing", PLANS)
def test_another_number_of_loops_keeps_the_multipliers_of_training(sharing):
    trained = tiny_model(sharing=sharing, num_repeats=2, **SHAPE)
    m = with_repeats(trained, 3)
    assert m.plan == PLANS[sharing]
    assert multipliers(m) == multipliers(trained)
    assert multipliers(m).residual == 3 / 4
    params, tokens = random_params(m), np.arange(9, dtype=np.int32)[None]
    state = numpy_states(params, tokens[0], trained, PLANS[sharing])[-1]
    expected = _numpy_norm(state, params["final_norm"]["gain"], trained)  # at the base width, logits * 1
    actual = jax.jit(model.hidden, static_argnums=2)(params, tokens, m)
    np.testing.assert_allclose(actual[0], expected, rtol=1e-4, atol=1e-4)


def test_going_back_and_forth_ends_where_it_began():
    trained = tiny_model(sharing="reverse", num_repeats=2, **SHAPE)
    assert with_repeats(trained, 2) is trained
    one = with_repeats(with_repeats(trained, 4), 1)
    assert isinstance(one, LoopedModel)
    assert (one.plan, one.trained_repeats, one.scaled_depth) == ((0, 1), 2, 4)
    assert with_repeats(one, 2).plan == trained.plan


@pytest.mark.parametrize("sharing", ["none", "0 1 0 0"])
def test_plans_without_loops_are_refused(sharing):
    message = (
        rf"^num_repeats=2: model.sharing={sharing!r} has no loops to count; it takes a model of immediate, "
        "repeat_all or reverse$"
    )
    with pytest.raises(UserError, match=message):
        with_repeats(tiny_model(sharing=sharing), 2)
    with pytest.raises(UserError, match=r"model\.num_repeats"):
        with_repeats(tiny_model(sharing="reverse"), 0)


def test_generation_applies_the_loops_asked_for():
    m = with_repeats(tiny_model(sharing="repeat_all", num_repeats=1, **SHAPE), 3)
    params, tokens = random_params(m), [3, 1, 4]
    sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0)
    steps = Generator(params, m, sampling, context=16).start([tokens], 4, None, 0)
    forward = jax.jit(model.apply, static_argnums=2)
    for (token,) in steps:
        padded = np.array([tokens + [0] * (8 - len(tokens))], np.int32)
        assert token == int(np.argmax(forward(params, padded, m)[0, len(tokens) - 1]))
        tokens = [*tokens, token]


# --- records and reports --------------------------------------------------------------------------------


def entry(loss, count, **changes):
    levels = {"name": "hops", "level": [1, 2], "accuracy": [0.9, 0.1 * count]}
    return {
        "loss": loss,
        "error": 1 - 0.1 * count,
        "levels": levels,
        "layers": 2 * count,
        "trained": 2,
        **changes,
    }


def study(metric="error"):
    return study_of(
        [
            make_record(
                depth=depth,
                seed=seed,
                score=0.5,
                metric=metric,
                loops={str(count): entry(3 / count + 0.1 * seed, count) for count in (4, 1, 2, 12)},
            )
            for depth in (2, 4)
            for seed in (0, 1)
        ]
    )


def test_scores_stand_by_design_and_number_of_loops():
    found = looped(study().points, "error")
    assert [(of.point, of.count) for of in found] == [
        (point, count) for point in ("2 x 128", "4 x 128") for count in (1, 2, 4, 12)
    ]
    assert found[1].loss.mean == pytest.approx(1.55)
    assert (found[1].loss.n, found[1].trained, found[1].layers) == (2, 2, 4)
    table = tables.table(study())
    assert table["loops"][:4] == ["1", "2 *", "4", "12"]
    assert table["exact match, %"][:2] == ["10.00", "20.00"]
    assert (table["1 hops"][1], table["2 hops"][2]) == ("90.0", "40.0")
    assert "exact match, %" not in tables.table(study("loss"))


def test_the_report_has_loops_only_where_they_were_scored():
    figure = tables.draw(study())
    assert figure is not None
    left, right = figure.axes
    assert list(left.get_lines()[0].get_ydata()) == pytest.approx([3.05, 1.55, 0.8, 0.3])
    assert list(right.get_lines()[0].get_ydata()) == pytest.approx([10, 20, 40, 120])
    plain = study_of([make_record(depth=d) for d in (2, 4)])
    assert (tables.table(plain), tables.draw(plain)) == ({}, None)
    images = dict.fromkeys(["", "-curves", "-loops"], pages.Image("a.png", "", b""))
    contents = dict(pages.contents(study(), images))
    assert [type(block).__name__ for block in contents["Other numbers of loops"]] == ["Image", "str", "dict"]
    assert dict(pages.contents(plain, images))["Other numbers of loops"] == []
