"""Validation rules, dataclasses from untrusted mappings, and their error messages."""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from mobilellm_jax.errors import UserError, did_you_mean

T = TypeVar("T")
Rule = tuple[Callable[[Any], bool], str]  # predicate, and a description of valid values


def check(ok: bool, field: str, value: object, valid: str) -> None:
    """Raises UserError, naming the field, its value and what would be valid, unless `ok`."""
    if not ok:
        raise UserError(f"{field}: {value!r} is not valid; expected {valid}")


def check_all(config: object, rules: Mapping[str, Rule], prefix: str = "") -> None:
    """Checks attributes of `config`, name by name; errors as in `check`, with `prefix` before the name."""
    for name, rule in rules.items():
        check_rule(f"{prefix}{name}", getattr(config, name), rule)


def check_rule(field: str, value: object, rule: Rule) -> None:
    """Checks one value; errors as in `check`."""
    is_valid, valid = rule
    check(is_valid(value), field, value, valid)


# Sizes and counters are int32 on a device.
POSITIVE_INT = (lambda v: 1 <= v < 2**31, "an integer from 1 to 2**31 - 1")
COUNT = (lambda v: 0 <= v < 2**31, "an integer from 0 to 2**31 - 1")
POSITIVE = (lambda v: 0 < v < math.inf, "a positive number")
NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "a number of at least 0")
FRACTION = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
PATTERN = (lambda v: _is_pattern(v), "a regular expression")
BELOW_ONE = (lambda v: 0 <= v < 1, "a number from 0 up to, but less than, 1")


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text).pattern)
    except re.error:
        return False


def one_of(names: tuple[str, ...]) -> Rule:
    """Rule: the value is one of `names`."""
    return lambda v: v in names, "one of " + ", ".join(names)


def some_of(names: tuple[str, ...]) -> Rule:
    """Rule: the value is a list of `names`, joined by commas; it may be empty."""
    return lambda v: not v or set(v.split(",")) <= set(names), f"some of {','.join(names)}, joined by commas"


def from_mapping(cls: type[T], values: Any, prefix: str = "", *, widen: bool = False) -> T:
    """Builds a dataclass from parsed JSON or a `ConfigDict`, with names and types checked by its annotations.

    Annotations are plain types, `X | None`, `Literal`, lists, dictionaries, `Any`, and dataclasses in turn.
    A field with a default may be missing, and one with `before` in its metadata, which then is its value. A
    field with `derive` in its metadata may be None, and is then `derive(fields)`, a function of the fields
    that are given.

    Args:
      cls: the dataclass.
      values: its fields by name.
      prefix: text before the name of a field in messages.
      widen: accept an int for a float.

    Raises:
      UserError: a field is unknown, missing, of the wrong type or not finite; the message names it.
    """
    if not isinstance(values, Mapping):
        try:
            values = dict(values.items())  # ConfigDict is not a Mapping
        except AttributeError:
            name = prefix.rstrip(".: ") or cls.__name__.lower()
            raise UserError(f"{name}: {values!r} is not a mapping of field names to values") from None
    known = _fields(cls)
    for name in values:
        if name not in known:
            raise UserError(f"{prefix}{name}: no such field; {did_you_mean(str(name), known)}")
    fields, derived = {}, []
    for name, (field, wanted) in known.items():
        if name not in values and "before" in field.metadata:
            fields[name] = field.metadata["before"]
        elif name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{prefix}{name}: the field is missing")
        elif values[name] is None and "derive" in field.metadata:
            derived.append(name)
        elif isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            fields[name] = from_mapping(wanted, values[name], f"{prefix}{name}.", widen=widen)
        elif widen and wanted is float and type(values[name]) is int and abs(values[name]) < 2**53:
            fields[name] = float(values[name])
        else:
            _check_type(values[name], wanted, f"{prefix}{name}")
            fields[name] = values[name]
    given = types.MappingProxyType(fields)
    return cls(**fields, **{name: known[name][0].metadata["derive"](given) for name in derived})


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Any, Any]]:
    """Maps the name of every field to the field and its type."""
    hints = typing.get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls)}


@functools.cache
def _parts(wanted: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(wanted), typing.get_args(wanted)


def _check_type(value: Any, wanted: Any, field: str) -> None:
    """Raises UserError unless `value`, made of JSON types, is of type `wanted` and finite throughout."""
    origin, args = _parts(wanted)
    kinds = args if origin is types.UnionType else (wanted,)
    takes_none = wanted is Any or types.NoneType in kinds
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field}: {value} is not a finite number{'; write null' if takes_none else ''}")
    if wanted is Any and type(value) in (list, dict):  # only to find numbers that are not finite
        origin, args = type(value), (Any, Any)
    if origin is types.UnionType and value is not None and type(args[0]) is types.GenericAlias:
        return _check_type(value, args[0], field)  # X | None
    if origin in (list, dict) and type(value) is origin:
        is_list = isinstance(value, list)
        if args[-1] is str and set(map(type, value if is_list else value.values())) <= {str}:
            return  # fast path: a record has thousands of labels in its pairs
        for key, item in enumerate(value) if is_list else value.items():
            _check_type(item, args[-1], f"{field}[{key}]" if is_list else f"{field}.{key}")
        return
    ok = value in args if origin is Literal else wanted is Any or type(value) in kinds
    if not (ok or (value is None and takes_none)):
        expected = str(wanted).removeprefix("typing.") if args else wanted.__name__
        raise UserError(f"{field}: {value!r} is of type {type(value).__name__}; expected {expected}")
