"""Roles of config fields: what may differ between two runs, and what follows where it does."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Role:
    """Role of a config field, and the facts that the role leaves open.

    Attributes:
      kind: "science" changes what is learned; "placement", where and how it is computed; "cadence", when
        something is logged, evaluated or saved; "identity", which run of several equal ones it is.
      doc: meaning of the field.
      compiled: compiled programs depend on it. True is the safe side: it costs a compilation at worst.
      decisive: losses that differ in it are never compared.
      derived: where it is None, it follows from other fields.
      pinned: a run keeps it when it is resumed, though it is placement.
      shown: tables and figures read it from records.
    """

    kind: Literal["science", "placement", "cadence", "identity"]
    doc: str
    compiled: bool = True
    decisive: bool = False
    derived: bool = False
    pinned: bool = False
    shown: bool = False

    @property
    def resumable(self) -> bool:
        """It may differ when a run is resumed."""
        return self.kind in ("placement", "cadence") and not self.pinned

    @property
    def idle(self) -> bool:
        """Without influence on the loss beyond rounding and chance, or implied by other fields."""
        return self.kind != "science" or self.derived


def _field(
    kind: Any, doc: str, *, derive: Callable[[Mapping[str, Any]], Any] | None = None, **facts: bool
) -> Any:
    metadata = {"role": Role(kind, doc, derived=derive is not None, **facts)}
    return dataclasses.field(metadata=metadata | ({"derive": derive} if derive else {}))


science = functools.partial(_field, "science")
placement = functools.partial(_field, "placement")
cadence = functools.partial(_field, "cadence", compiled=False)
identity = functools.partial(_field, "identity", compiled=False)


def roles_of(cls: type, prefix: str = "") -> dict[str, Role]:
    """Roles by dotted name, of the fields of a dataclass and of the dataclasses in it.

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
