"""One checker of dataclasses from outside: what is built, and what is refused by name."""

import dataclasses
import math
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.validation import POSITIVE_INT, check_all, from_mapping


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    double: int = dataclasses.field(metadata={"derive": lambda fields: 2 * fields["size"]})


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    rate: float
    kind: Literal["a", "b"]
    table: dict[str, list[int | None]]
    anything: Any
    note: str | None = None


GOOD = {
    "inner": {"size": 2, "double": None},
    "rate": 1.0,
    "kind": "a",
    "table": {"x": [1, None]},
    "anything": 0,
}


@pytest.mark.parametrize("group", [dict, ConfigDict])
def test_what_is_built(group):
    values = {**GOOD, "inner": group(GOOD["inner"])}
    assert from_mapping(Outer, values) == Outer(Inner(2, 4), 1.0, "a", {"x": [1, None]}, 0)
    given = {**GOOD, "inner": {"size": 2, "double": 5}, "note": "n"}
    assert from_mapping(Outer, given) == Outer(Inner(2, 5), 1.0, "a", {"x": [1, None]}, 0, "n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": 3}, "f: inner: 3 is not a mapping of field names to values"),
        ({"inner": {"size": 2}}, "f: inner.double: the field is missing"),
        ({"inner": {"size": None, "double": 1}}, "f: inner.size: None is of type NoneType; expected int"),
        ({"inner": {"size": 2, "double": "x"}}, "f: inner.double: 'x' is of type str; expected int"),
        ({"inner": {**GOOD["inner"], "sise": 2}}, "f: inner.sise: no such field; did you mean size?"),
        ({"rate": 1}, "f: rate: 1 is of type int; expected float"),
        ({"rate": math.nan}, "f: rate: nan is not a finite number"),
        ({"kind": "c"}, "f: kind: 'c' is of type str; expected Literal['a', 'b']"),
        ({"table": [1]}, "f: table: [1] is of type list; expected dict[str, list[int | None]]"),
        ({"table": {"x": [1, True]}}, "f: table.x[1]: True is of type bool; expected int | None"),
        ({"anything": [{"y": -math.inf}]}, "f: anything[0].y: -inf is not a finite number; write null"),
        ({"note": 1}, "f: note: 1 is of type int; expected str | None"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError) as error:
        from_mapping(Outer, {**GOOD, **changes}, "f: ")
    assert str(error.value) == message


def test_what_is_no_group_at_all_is_named_by_its_class():
    with pytest.raises(UserError, match=r"^outer: 3 is not a mapping of field names to values$"):
        from_mapping(Outer, 3)


def test_an_integer_widens_to_a_float_where_it_loses_nothing():
    rate = from_mapping(Outer, {**GOOD, "rate": 3}, widen=True).rate
    assert (type(rate), rate) == (float, 3.0)
    for value in (2**53, True, "3"):
        with pytest.raises(UserError, match=f"rate: {value!r} is of type"):
            from_mapping(Outer, {**GOOD, "rate": value}, widen=True)


@pytest.mark.parametrize(("prefix", "name"), [("", "size"), ("inner.", "inner.size")])
def test_rules_name_the_field(prefix, name):
    with pytest.raises(UserError, match=rf"^{name}: 0 is not valid; expected an integer from 1 to"):
        check_all(Inner(0, 0), {"size": POSITIVE_INT}, prefix)
