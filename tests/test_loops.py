"""Other numbers of loops than in training, against loops over layers in NumPy."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from conftest import init, random_params, tiny_config, tiny_model
from test_diagnostics import numpy_states
from test_loop import FIELDS, TASK, naive_loss
from test_model import _numpy_norm
from test_results import make_record
from test_train import run_loop

from experiments.reporting import loops as tables
from experiments.reporting import pages
from experiments.runner import looping
from mobilellm_jax import data, model
from mobilellm_jax.analysis.loops import looped
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.config import from_config_dict, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import Preempted, UserError
from mobilellm_jax.inference.generate import Generator, Sampling
from mobilellm_jax.loops import LoopedModel, with_repeats
from mobilellm_jax.model.parameterization import multipliers
from mobilellm_jax.quantization.apply import quantized_config
from mobilellm_jax.quantization.aware import trained_model
from mobilellm_jax.quantization.schemes import parse
from mobilellm_jax.runs.directory import check_same, read_config
from mobilellm_jax.training.draws import loops_of_steps
from mobilellm_jax.training.optimizer import learning_rate_schedule

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


@pytest.mark.parametrize(
    "trained", [{"train.quantize": "w8a8"}, {"train.lora_rank": 2, "train.init_from": "runs/first"}, {}]
)
def test_what_is_added_to_a_model_keeps_the_plan_that_it_was_trained_in(trained):
    """Or its residual branches would be divided by another number of layers than in training."""
    config = tiny_config(
        **{"model.sharing": "repeat_all", "model.num_repeats": 2, "model.loop_norm": True, **trained}
    )
    depth, asked = config.model.depth, looping.looped(config, 1)
    for once in (trained_model(asked), quantized_config(asked.model, parse("w8a8"))):
        assert (once.effective_depth, once.scaled_depth, once.num_uses) == (depth, 2 * depth, 2)


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


# --- numbers of loops drawn in training -----------------------------------------------------------------

DRAWN = {
    **FIELDS,
    **TASK,
    "model.sharing": "immediate",
    "model.num_repeats": 2,
    "train.loops": "1..2",
    "train.accumulation_steps": 1,
    "train.steps": 6,
    "train.eval_every": 6,
    "train.log_every": 1,
    "optimizer.warmup_steps": 1,
}


@pytest.mark.slow
def test_every_step_takes_the_loops_that_its_number_draws(tmp_path):
    """Against a plain loop over models with a `num_repeats` each, and stopped and resumed in between."""
    config = tiny_config(**DRAWN)
    straight, _ = run_loop(config, tmp_path / "straight")
    counts = loops_of_steps(config)
    assert set(counts) == {1, 2}
    losses = list(plain_losses(config, counts.tolist()))
    assert [loss for _, loss in straight.train_curve] == pytest.approx(losses, rel=1e-4)
    with pytest.raises(Preempted, match="after step 4"):
        run_loop(config, tmp_path / "stopped", "step 3/6")
    resumed, _ = run_loop(config, tmp_path / "stopped")
    assert resumed.train_curve == straight.train_curve
    assert resumed.evaluations == straight.evaluations


def plain_losses(config, counts):
    o, t = config.optimizer, config.train
    params, rates = init(jax.random.key(t.init_seed), config.model), learning_rate_schedule(o, t.steps)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "gain" not in str(path), params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(rates, o.beta1, o.beta2, o.epsilon, weight_decay=o.weight_decay, mask=mask),
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    prepared = data.prepare(config.data, config.model.vocab_size)
    batches = prepared.train_batches(batch_size=t.batch_size, seed=t.data_seed)
    for count in counts:
        shape = dataclasses.replace(config.model, num_repeats=count)
        (loss, _), grads = naive_loss(params, next(batches), shape)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield float(loss)


def test_draws_depend_on_seed_and_step_alone():
    def draws(**changes):
        return loops_of_steps(tiny_config(**{**DRAWN, "train.loops": "1..4", **changes}))

    many = draws(**{"train.steps": 4000})
    assert np.array_equal(many[:6], draws())
    assert not np.array_equal(many[:40], draws(**{"train.steps": 40, "train.data_seed": 1}))
    assert np.array_equal(many[:40], draws(**{"train.steps": 40, "train.init_seed": 1}))
    shares = np.bincount(many)[1:] / 4000
    assert shares == pytest.approx([0.25] * 4, abs=0.03)
    assert loops_of_steps(tiny_config()) is None


def test_costs_are_expected_ones():
    config = tiny_config(**{**DRAWN, "train.loops": "1..3"})
    budgets, length = accounting.run_budgets(config), config.data.sequence_length
    shapes = [dataclasses.replace(config.model, num_repeats=count) for count in (1, 2, 3)]
    flops = [accounting.train_flops_per_token(shape, length) for shape in shapes]
    assert flops[0] < flops[1] < flops[2]
    assert budgets["train_flops_per_token"] == pytest.approx(sum(flops) / 3)
    assert budgets["activation_bytes"] == accounting.activation_bytes(shapes[2], length, 8)
    fixed = tiny_config(**{**DRAWN, "train.loops": ""})
    assert accounting.run_budgets(fixed) == accounting.budgets(shapes[1], length, 8)
    assert budgets["inference_flops_per_token"] == accounting.forward_flops_per_token(shapes[1], length)


@pytest.mark.parametrize("count", [1, 5])
def test_a_model_of_drawn_loops_is_scored_with_any_number(count):
    config = looping.looped(tiny_config(**DRAWN), count)
    assert (config.model.num_repeats, config.train.loops) == (count, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.loops": "1-4"}, r"^train.loops: '1-4' is not a range; expected one such as '1..4', or ''$"),
        ({"train.loops": "3..3"}, r"^train.loops: '3..3' is not a range"),
        ({"train.loops": "0..3"}, r"^train.loops: '0..3' is not a range"),
        ({"train.loops": "3..4"}, r"^train.loops: '3..4' does not hold model.num_repeats=2"),
        (
            {"model.sharing": "0 1 1 0", "model.num_repeats": 1},
            r"^train.loops: '1..2' has no meaning with model.sharing='0 1 1 0'; use one of immediate, ",
        ),
    ],
)
def test_ranges_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**{**DRAWN, **changes})


def test_a_run_from_before_there_were_ranges_goes_on(tmp_path):
    config = tiny_config()
    old = to_dict(config)
    del old["train"]["loops"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert from_config_dict(read_config(tmp_path / "config.json")) == config
    assert check_same(tmp_path / "config.json", old, config) == []
    drawn = tiny_config(**DRAWN)
    with pytest.raises(UserError, match=r"train\.loops is '' there and '1\.\.2' here"):
        check_same(tmp_path / "config.json", old, drawn)
