"""JSON from files that anything may have happened to: parsed without surprises, and with a seal.

The seal is a hash of all values of an object, so that damage to one of them is noticed.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"


def parse(content: str | bytes) -> Any:
    """Returns what JSON text stands for; raises ValueError, and nothing else, for what is not JSON."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values`, which are of JSON types, with the seal as the last."""
    return {**values, SEAL: _hash(values)}


def unseal(values: Any) -> dict[str, Any]:
    """Returns the values without their seal.

    Raises:
      ValueError: they are not what was sealed, or never were.
    """
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError(f"not a JSON object with a {SEAL}")
    rest = {name: value for name, value in values.items() if name != SEAL}
    if values[SEAL] != _hash(rest):
        raise ValueError(f"changed since it was written: the {SEAL} in it does not agree")
    return rest


def unseal_if_sealed(values: Any) -> Any:
    """Returns the values without their seal, if they have one; files of earlier versions have none.

    Raises:
      ValueError: as `unseal`. Damage to the name of the seal shows as a name that nobody knows: look for it.
    """
    return unseal(values) if isinstance(values, dict) and SEAL in values else values


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
