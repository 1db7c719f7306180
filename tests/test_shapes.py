"""The solver against loops over all shapes, the shapes chosen by hand, and the command that prints them."""

import dataclasses
import math

import pytest
from commands import command as run
from commands import real
from conftest import tiny_model

from configs import base, depth_vs_width, mobilellm
from experiments import shapes as command
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.latency import TIMES, Fit, Latency, features
from mobilellm_jax.costs.shapes import BUDGETS, Rules, Shape, solve
from mobilellm_jax.errors import UserError

LENGTH = 16
LATENCY = Latency(  # of a device where everything takes time
    {"float32": {t: Fit(dict.fromkeys(features(t, tiny_model(), 16), 0.1), {}, ()) for t in TIMES}}
)
GROUPED = tiny_model(num_heads=4, num_kv_heads=2, head_dim=6, width=24, ffn_width=64)
RULES = Rules(head_dims=(), ffn_step=4, ffn_band=0.15, tolerance=0.02)


def every_shape(model, budget, target, head_dims, ffn_step, band, depths, most_heads=16):
    """Returns (mismatch, proportion, config) of all shapes, found by trying every heads and ffn_width."""
    group, found = model.num_heads // model.num_kv_heads, []
    for depth in depths:
        for head_dim in head_dims:
            for heads in range(1, most_heads + 1):
                for ffn in range(1, int(heads * head_dim * 4)):
                    proportion = abs((ffn / (heads * head_dim)) / (model.ffn_width / model.width) - 1)
                    if heads % group or ffn % ffn_step or proportion > band + 1e-12:
                        continue
                    config = dataclasses.replace(
                        model,
                        depth=depth,
                        width=heads * head_dim,
                        num_heads=heads,
                        num_kv_heads=heads // group,
                        head_dim=head_dim,
                        ffn_width=ffn,
                    )
                    value = accounting.budgets(config, LENGTH, 1, LATENCY)[budget]
                    found.append(((value - target) / target, proportion, config))
    return found


def assert_best(shape, found, tolerance):
    """Of the shapes within the tolerance none has better proportions, and none as good is closer."""
    within = [(mismatch, proportion) for mismatch, proportion, _ in found if abs(mismatch) <= tolerance]
    best = min(within, key=lambda m: (round(m[1], 9), abs(m[0])))
    chosen = [(mismatch, proportion) for mismatch, proportion, config in found if config == shape.config]
    assert chosen == [(pytest.approx(best[0]), pytest.approx(best[1]))]
    assert shape.mismatch == pytest.approx(best[0])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_heads": 3, "num_kv_heads": 3}, {"sharing": "reverse", "num_repeats": 2, "ffn_kind": "relu"}],
    ids=str,
)
def test_depth_given_no_shape_is_better(budget, overrides):
    model = dataclasses.replace(GROUPED, **overrides)
    wanted = dataclasses.replace(model, depth=3, width=48, num_heads=8, num_kv_heads=4, ffn_width=120)
    target = accounting.budgets(wanted, LENGTH, 1, LATENCY)[budget] * 1.003
    rules = dataclasses.replace(RULES, head_dims=(4, 6))
    shape = solve(model, budget, target, length=LENGTH, rules=rules, depth=3, latency=LATENCY)
    found = every_shape(model, budget, target, (4, 6), 4, 0.15, [3])
    assert_best(shape, found, 0.02)
    assert shape.mismatch == accounting.budgets(shape.config, LENGTH, 1, LATENCY)[budget] / target - 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_width_given_no_shape_is_better(budget):
    target = accounting.budgets(dataclasses.replace(GROUPED, depth=7), LENGTH, 1, LATENCY)[budget] * 1.01
    shape = solve(GROUPED, budget, target, length=LENGTH, rules=RULES, width=24, latency=LATENCY)
    found = every_shape(GROUPED, budget, target, (6,), 4, 0.15, range(1, 12), most_heads=4)
    assert_best(shape, [m for m in found if m[2].width == 24], 0.02)
    assert shape.config.depth in (6, 7, 8)


def test_proportions_count_before_a_closer_match_but_only_within_the_tolerance():
    target = accounting.parameters(GROUPED).total * 1.01
    arguments = {"length": LENGTH, "depth": GROUPED.depth}
    rules = dataclasses.replace(RULES, ffn_step=1)
    assert solve(GROUPED, "total_parameters", target, rules=rules, **arguments).config == GROUPED
    strict = dataclasses.replace(rules, tolerance=0.005)
    closer = solve(GROUPED, "total_parameters", target, rules=strict, **arguments)
    assert closer.config.ffn_width != GROUPED.ffn_width
    assert abs(closer.mismatch) <= 0.005


def test_of_equal_shapes_the_one_with_the_head_size_of_the_base_wins():
    model = dataclasses.replace(GROUPED, num_heads=4, num_kv_heads=4)
    target = float(accounting.parameters(model).total)
    rules = dataclasses.replace(RULES, head_dims=(2, 4, 12, 6))
    shape = solve(model, "total_parameters", target, length=LENGTH, rules=rules, depth=model.depth)
    assert shape.config == model


HAND_MADE = [(preset, row) for preset, rows in depth_vs_width._MATCHED.items() for row in range(len(rows))]


@pytest.mark.parametrize(("preset", "row"), HAND_MADE)
def test_at_least_as_close_as_the_shapes_chosen_by_hand(preset, row):
    models = [
        from_config_dict(base.update(depth_vs_width.get_config(preset), overrides)).model
        for overrides in depth_vs_width.sweep(preset)
    ]
    third, by_hand = models[2], models[row]
    target = float(accounting.parameters(third).non_embedding)
    mismatch = abs(accounting.parameters(by_hand).non_embedding / target - 1)
    rules = Rules(head_dims=(by_hand.head_dim,), ffn_step=4, ffn_band=0.3, tolerance=mismatch)
    shape = solve(third, "non_embedding_parameters", target, length=LENGTH, rules=rules, depth=by_hand.depth)
    assert abs(shape.mismatch) <= mismatch


@pytest.mark.parametrize("depth", [pytest.param(4, marks=pytest.mark.slow), 30, 62])
@pytest.mark.parametrize("budget", ["total_parameters", "train_flops_per_token"])
def test_large_models_take_few_evaluations(depth, budget, monkeypatch):
    """Of about 50 microseconds each, so that the search takes less than a second."""
    model = from_config_dict(mobilellm.get_config("125m")).model
    target = float(accounting.budgets(model, 2048, 1)[budget])
    rules = Rules(head_dims=(16, 32, 64), ffn_step=4, ffn_band=0.15, tolerance=0.02)
    evaluations, budgets = [], accounting.budgets
    monkeypatch.setattr(accounting, "budgets", lambda *a, **kw: evaluations.append(1) or budgets(*a, **kw))
    shape = solve(model, budget, target, length=2048, rules=rules, depth=depth)
    assert len(evaluations) < 5000
    assert shape.config.depth == depth
    if depth == 30:
        assert shape == Shape(model, 0.0)


@pytest.mark.parametrize("factor", [0.01, 1.2, 5.0])
def test_where_no_shape_fits_the_nearest_of_three_widths_are_named(factor):
    target = factor * accounting.parameters(GROUPED).non_embedding
    found = every_shape(GROUPED, "non_embedding_parameters", target, (6,), 4, 0.1, [GROUPED.depth])
    rules = dataclasses.replace(RULES, ffn_band=0.1)
    with pytest.raises(UserError) as error:
        solve(GROUPED, "non_embedding_parameters", target, length=LENGTH, rules=rules, depth=GROUPED.depth)
    message = str(error.value)
    assert "\n" not in message
    by_width = {m[2].width: m for m in sorted(found, key=lambda m: -abs(m[0]))}  # the last one stays
    nearest = sorted(by_width.values(), key=lambda m: abs(m[0]))[:3]
    sizes = "width {0.width}, {0.num_heads} heads of 6, {0.num_kv_heads} kv heads, ffn_width {0.ffn_width}"
    places = [message.index(f"{sizes.format(config)} ({mismatch:+.2%})") for mismatch, _, config in nearest]
    assert places == sorted(places)
    assert message.count(" heads of ") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "total"}, "budget: 'total' is not valid; expected a budget; valid names: decode_bytes"),
        ({"target": 0.0}, "total_parameters: 0.0 is not valid; expected a positive number"),
        ({"target": math.inf}, "total_parameters: inf is not valid"),
        ({"width": 24}, r"depth, width: \(2, 24\) is not valid; expected one of them"),
        ({"depth": None}, r"depth, width: \(None, None\) is not valid; expected one of them"),
        ({"budget": "decode_ms"}, "budget: decode_ms is that of a device; give a table"),
        ({"depth": 0}, "depth: 0 is not valid; expected an integer from 1 to 1,024"),
        ({"depth": None, "width": 25}, "width: 25 is not a multiple of 12 .* the nearest: 24"),
        (
            {"depth": 3, "base": dataclasses.replace(GROUPED, sharing="0 1 0")},
            "every block from 0 to 2",
        ),
        (
            {"depth": None, "width": 24, "base": dataclasses.replace(GROUPED, sharing="0 1 0")},
            "the plan model.sharing='0 1 0' fixes the depth; give depth",
        ),
        (
            {"rules": dataclasses.replace(RULES, ffn_step=10**6)},
            "ffn_step: no multiple of 1000000 is within 15% of 2.67 widths",
        ),
        (
            {"target": 1.0},
            "within 2.00% of 1; nearest: depth 2, width 12, 2 heads of 6",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, message):
    known = {"base": GROUPED, "budget": "total_parameters", "target": 1e4, "depth": 2, "rules": RULES}
    with pytest.raises(UserError, match=message):
        solve(**known | {"length": LENGTH} | arguments)


@pytest.mark.parametrize(
    ("field", "value"), [("head_dims", (6, 0)), ("ffn_step", 0), ("ffn_band", 1.0), ("tolerance", -0.1)]
)
def test_bad_rules(field, value):
    with pytest.raises(UserError, match=f"{field.removesuffix('s')}.*is not valid"):
        dataclasses.replace(RULES, **{field: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("110000", 110_000),
        ("110_000", 110_000),
        ("110k", 110_000),
        ("125M", 125e6),
        ("1.5B", 1.5e9),
        ("2e9", 2e9),
    ],
)
def test_values_of_budgets(text, value):
    assert command.parse_budget(f"total_parameters:{text}") == ("total_parameters", value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected <name>:<value> with a name of total_parameters, "),
        ("total:110k", "--budget=total:110k: expected <name>"),
        ("total_parameters", "'' is not a positive number such as"),
        ("total_parameters:many", "'many' is not a positive number"),
        ("total_parameters:0", "'0' is not a positive number"),
        ("total_parameters:-5", "'-5' is not a positive number"),
        ("total_parameters:1,000", "'1,000' is not a positive number"),
    ],
    ids=str,
)
def test_bad_budgets_of_the_command(text, message):
    with pytest.raises(UserError, match=message):
        command.parse_budget(text)


@pytest.mark.parametrize("count", [1, 2])
def test_pasted_rows_are_the_shapes(count):
    shapes = [Shape(dataclasses.replace(GROUPED, depth=depth), 0.0) for depth in (1, 2)[:count]]
    text = command.paste(shapes)
    rows = list(eval(text.removeprefix("yield from "), {"base": base}))
    assert rows == [{f"model.{name}": value for name, value in shape.fields.items()} for shape in shapes]


def test_the_command_prints_shapes_that_a_study_accepts():
    result = real(
        "experiments.shapes",
        "--budget=non_embedding_parameters:110k",
        "--depth=1,2,4,8",
        "--head_dim=16",
        "--ffn_band=0.25",
        "--config.model.ffn_width=344",
    )
    assert result.returncode == 0, result.stderr
    rows = list(eval(result.stdout.partition("yield from ")[2], {"base": base}))
    models = [from_config_dict(base.update(base.get_config(), row)).model for row in rows]
    assert [model.depth for model in models] == [1, 2, 4, 8]
    counts = [accounting.parameters(model).non_embedding for model in models]
    assert max(counts) / min(counts) - 1 <= 0.02
    printed = {line.split("  ")[0]: line.split()[1:] for line in result.stdout.splitlines() if "  " in line}
    assert printed["non_embedding_parameters"] == [f"{count:,}" for count in counts]
    assert printed["width"] == [str(model.width) for model in models]
    assert set(accounting.budgets(models[0], 1, 1)) < set(printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth=4", "--width=64"], "--depth, --width: give exactly one of them"),
        ([], "--depth, --width: give exactly one of them"),
        (["--depth=4,0"], "--depth=4,0: '0' is not an integer of at least 1"),
        (["--width=wide"], "--width=wide: 'wide' is not an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_flags_end_with_one_line_and_status_2(arguments, message):
    result = run("experiments.shapes", "--budget=total_parameters:1M", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
