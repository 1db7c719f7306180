"""Layer plans are written out by hand; every refusal names the field and what would be valid."""

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.sharing import STRATEGIES, layer_plan


@pytest.mark.parametrize(
    ("sharing", "depth", "num_repeats", "plan"),
    [
        ("none", 1, 1, (0,)),
        ("none", 3, 1, (0, 1, 2)),
        ("immediate", 3, 1, (0, 1, 2)),
        ("immediate", 3, 2, (0, 0, 1, 1, 2, 2)),
        ("immediate", 2, 3, (0, 0, 0, 1, 1, 1)),
        ("repeat_all", 3, 1, (0, 1, 2)),
        ("repeat_all", 3, 2, (0, 1, 2, 0, 1, 2)),
        ("repeat_all", 2, 3, (0, 1, 0, 1, 0, 1)),
        ("reverse", 3, 1, (0, 1, 2)),
        ("reverse", 3, 2, (0, 1, 2, 2, 1, 0)),
        ("reverse", 3, 3, (0, 1, 2, 2, 1, 0, 0, 1, 2)),
        ("reverse", 2, 4, (0, 1, 1, 0, 0, 1, 1, 0)),
        ("0", 1, 1, (0,)),
        ("0 1 2 1 2 3", 4, 1, (0, 1, 2, 1, 2, 3)),
        ("  2 0\t1 ", 3, 1, (2, 0, 1)),
    ],
)
def test_plan(sharing, depth, num_repeats, plan):
    assert layer_plan(sharing, depth, num_repeats) == plan


@pytest.mark.parametrize(
    ("sharing", "depth", "num_repeats", "field", "parts"),
    [
        ("none", 3, 2, "model.num_repeats", ["2", "num_repeats=1", "immediate, repeat_all, reverse"]),
        ("0 1", 2, 2, "model.num_repeats", ["2", "'0 1'", "num_repeats=1"]),
        ("revers", 3, 1, "model.sharing", ["'revers'", "did you mean reverse?"]),
        ("sideways", 3, 1, "model.sharing", ["'sideways'", "immediate, none, repeat_all, reverse", "'0 1 2"]),
        ("", 3, 1, "model.sharing", ["''", "immediate"]),
        ("0 -1", 2, 1, "model.sharing", ["'0 -1'"]),
        ("0, 1", 2, 1, "model.sharing", ["'0, 1'"]),
        ("0 1 3", 3, 1, "model.sharing", ["'0 1 3'", "from 0 to 2", "model.depth=3"]),
        ("0 2", 3, 1, "model.sharing", ["'0 2'", "from 0 to 2"]),
        ("0 " * 10_001, 1, 1, "model.sharing", ["10,001 layers", "at most 10,000"]),
    ],
)
def test_refusal(sharing, depth, num_repeats, field, parts):
    with pytest.raises(UserError) as error:
        layer_plan(sharing, depth, num_repeats)
    assert str(error.value).startswith(field + ":")
    for part in parts:
        assert part in str(error.value)


def test_every_strategy_has_a_row_above():
    """A new strategy must come with its plan written out."""
    assert set(STRATEGIES) == {"none", "immediate", "repeat_all", "reverse"}
