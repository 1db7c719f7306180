"""Roles of config fields: which may differ between two runs, and the consequences where they do."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Role:
    """Role of a config field.

    Attributes:
      kind: "science" changes what is learned; "placement", where and how it is computed; "cadence", when
        something is logged, evaluated or saved; "identity", which of several equal runs it is.
      doc: meaning of the field.
      compiled: compiled programs depend on it. True is the safe default: at worst, it costs a compilation.
      decisive: runs that differ in it are never compared.
      derived: None stands for a value computed from other fields.
      pinned: must not change when a run is resumed, although it is placement.
      shown: tables and figures read it from records.
      before: what configs on disk mean that are older than the field; None: there are none.
    """

    kind: Literal["science", "placement", "cadence", "identity"]
    doc: str
    compiled: bool = True
    decisive: bool = False
    derived: bool = False
    pinned: bool = False
    shown: bool = False
    before: str | None = None

    @property
    def resumable(self) -> bool:
        """True if the field may change when a run is resumed."""
        return self.kind in ("placement", "cadence") and not self.pinned

    @property
    def idle(self) -> bool:
        """True if the field affects the loss by rounding and chance only, or is implied by other fields."""
        return self.kind != "science" or self.derived


def _field(
    kind: Any, doc: str, *, derive: Callable[[Mapping[str, Any]], Any] | None = None, **facts: Any
) -> Any:
    metadata = {"role": Role(kind, doc, derived=derive is not None, **facts)}
    return dataclasses.field(metadata=metadata | ({"derive": derive} if derive else {}))


science = functools.partial(_field, "science")
placement = functools.partial(_field, "placement")
cadence = functools.partial(_field, "cadence", compiled=False)
identity = functools.partial(_field, "identity", compiled=False)


def roles_of(cls: type, prefix: str = "") -> dict[str, Role]:
    """Collects the roles of all fields of a dataclass, nested ones included, by dotted name.

    Raises:
      TypeError: a field has no role.
    """
    found = {}
    for field in dataclasses.fields(cls):
        name, kind = f"{prefix}{field.name}", typing.get_type_hints(cls)[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= roles_of(kind, f"{name}.")
        elif "role" in field.metadata:
            found[name] = field.metadata["role"]
        else:
            raise TypeError(
                f"config field {name}: has no role; define it as science(...) if it changes what is learned, "
                "placement(...) if where and how it is computed, cadence(...) if when something is logged or "
                "saved, identity(...) if it tells equal runs apart"
            )
    return found
