"""Rules for values, and the one sentence that is said when a value breaks its rule."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mobilellm_jax.errors import UserError

Rule = tuple[Callable[[Any], bool], str]  # whether a value is valid, and what would be


def check(ok: bool, field: str, value: object, valid: str) -> None:
    """Raises UserError, naming the field, its value and what would be valid, unless `ok`."""
    if not ok:
        raise UserError(f"{field}: {value!r} is not valid; expected {valid}")


def check_all(prefix: str, config: object, rules: Mapping[str, Rule]) -> None:
    """Checks attributes of `config`, name by name; errors as in `check`."""
    for name, (is_valid, valid) in rules.items():
        value = getattr(config, name)
        check(is_valid(value), f"{prefix}.{name}", value, valid)


# Sizes and counters are int32 on a device.
POSITIVE_INT = (lambda v: 1 <= v < 2**31, "an integer from 1 to 2**31 - 1")
COUNT = (lambda v: 0 <= v < 2**31, "an integer from 0 to 2**31 - 1")
POSITIVE = (lambda v: 0 < v < math.inf, "a positive number")
NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "a number of at least 0")
FRACTION = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
BELOW_ONE = (lambda v: 0 <= v < 1, "a number from 0 up to, but less than, 1")


def one_of(names: tuple[str, ...]) -> Rule:
    """Returns the rule that a value is one of `names`."""
    return lambda v: v in names, "one of " + ", ".join(names)
