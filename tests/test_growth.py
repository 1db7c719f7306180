"""Models that grow from a trained one: the same loss where it has to be, and what is refused."""

import jax
import numpy as np
import pytest
from conftest import apply, assert_trees_close, init, random_batch, random_params, tiny_config, tiny_model
from test_lineage import folder, start  # noqa: F401, a fixture

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import by_path
from mobilellm_jax.model.growth import grown, sources
from mobilellm_jax.runs.opening import open_run

SLOW = pytest.mark.slow
LOOP = {"sharing": "repeat_all", "num_repeats": 2}
SCALED = {"parameterization": "completep", "base_depth": 3, "base_width": 24}
OWN = {"loop_gains": True, "loop_rank": 2, "loop_scale": "1 0.5"}


@pytest.mark.parametrize(
    ("there", "here", "grow"),
    [
        pytest.param({**LOOP, **SCALED}, {"depth": 4, **SCALED}, "unroll", marks=SLOW),
        ({**LOOP, **SCALED, **OWN}, {"depth": 4, **SCALED}, "unroll"),
        pytest.param({**LOOP, **SCALED}, {"depth": 4, **SCALED}, "0 1 0 1", marks=SLOW),
        ({}, {"depth": 4, "sharing": "0 1 2 3 1"}, "0 1 0 1"),
        pytest.param(
            {**LOOP}, {**LOOP, **OWN, "loop_scale": "learned", "loop_embedding": True}, "0 1", marks=SLOW
        ),
    ],
    ids=["loop", "loop with uses", "by number", "stacked", "uses"],
)
def test_a_model_grows_from_a_smaller_one(there, here, grow):
    """The logits are the parent's where the layers applied are; else those of the blocks that are named."""
    there, here = tiny_model(**there), tiny_model(**here)
    params, (tokens, _) = random_params(there), random_batch(there)
    after = jax.device_get(grown(params, init(jax.random.key(0), here), there, here, grow))
    same = here.sharing != "0 1 2 3 1"
    plan = there if same else tiny_model(sharing="0 1 0 1 1")
    np.testing.assert_allclose(apply(after, tokens, here), apply(params, tokens, plan), rtol=1e-4, atol=1e-4)
    fresh = jax.eval_shape(lambda: init(jax.random.key(0), here))
    assert jax.tree.structure(after) == jax.tree.structure(fresh)
    if "0" in grow and not here.differing_uses:
        blocks = by_path(params["blocks"])
        expected = {path: leaf[np.array([0, 1, 0, 1])] for path, leaf in blocks.items()}
        assert_trees_close(by_path(after["blocks"]), expected, tolerance=0)


@SLOW
def test_a_run_starts_with_the_loss_of_the_loop_that_it_unrolls(folder):  # noqa: F811
    """Split over eight devices; then a stack of twice as many blocks, which has another loss."""
    loop = {f"model.{name}": value for name, value in LOOP.items()}
    start(folder, "loop", **loop, **{"train.steps": 6, "optimizer.learning_rate": 0.02})
    _, params = open_run(folder / "loop")
    small = {"train.steps": 1, "optimizer.learning_rate": 1e-30}
    known = start(folder, "same", "loop", **loop, **small).final["loss"]
    unrolled = start(folder, "unrolled", "loop", **small, **{"model.depth": 4, "train.grow": "unroll"})
    assert unrolled.final["loss"] == pytest.approx(known, rel=1e-6)
    assert unrolled.parent["run"] == "loop"
    _, after = open_run(folder / "unrolled")
    np.testing.assert_allclose(
        after["blocks"]["ffn"]["up"], params["blocks"]["ffn"]["up"][[0, 1, 0, 1]], atol=1e-6
    )
    stacked = start(folder, "stacked", "loop", **small, **{"model.depth": 3, "train.grow": "0 1 1"})
    assert abs(stacked.final["loss"] - known) > 1e-4


@pytest.mark.parametrize(
    ("grow", "there", "here", "message"),
    [
        (
            "unroll",
            LOOP,
            {"depth": 3},
            r"^train.grow: 'unroll' makes a block of each of the 4 layers that the parent",
        ),
        (
            "unroll",
            {**LOOP, "loop_norm": True},
            {"depth": 4},
            r"^train.grow: 'unroll' of a parent: model.loop_norm=True",
        ),
        (
            "0 1",
            {},
            {"depth": 3},
            r"^train.grow: '0 1' has to name a block of the parent, 0 to 1, for each of the 3",
        ),
        ("0 2 1", {}, {"depth": 3}, r"^train.grow: '0 2 1' has to name a block of the parent, 0 to 1"),
        (
            "double",
            {},
            {"depth": 4},
            r"^train.grow: 'double' is not valid; expected '', 'unroll', or a block of the",
        ),
        (
            "0 1",
            {**LOOP, **OWN},
            {},
            r"^train.grow: uses of a block differ in the parent \(model.loop_gains=True\)",
        ),
    ],
)
def test_growth_that_does_not_fit_is_refused(grow, there, here, message):
    with pytest.raises(UserError, match=message):
        sources(grow, tiny_model(**there), tiny_model(**here))


@pytest.mark.parametrize("name", ["resume_optimizer", "resize_embedding"])
def test_growth_is_alone(name):
    with pytest.raises(UserError, match=rf"^train.grow: 'unroll' does not go with train.{name}=True"):
        tiny_config(**{"train.init_from": "runs/first", "train.grow": "unroll", f"train.{name}": True})


def test_growth_needs_a_parent_of_the_same_width(folder):  # noqa: F811
    with pytest.raises(
        UserError, match=r"^train.grow: unroll needs a run to start from; set train.init_from$"
    ):
        tiny_config(**{"train.grow": "unroll"})
    with pytest.raises(
        UserError, match=r"has another model: model.width is 24 there and 28 here; use its values"
    ):
        start(folder, "wider", "first", **{"model.width": 28, "model.depth": 3, "train.grow": "0 1 1"})
    with pytest.raises(
        UserError, match=r"model.depth is 2 there and 3 here; .*; other blocks alone: train.grow$"
    ):
        start(folder, "deeper", "first", **{"model.depth": 3})
