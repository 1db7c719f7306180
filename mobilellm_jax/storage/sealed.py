"""JSON with a checksum, so that corruption is detected on read.

The seal of an object is the sha256 of all its other fields.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"


def parse(content: str | bytes) -> Any:
    """Parses JSON; ValueError is the only error for invalid text."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the checksum as the last field; values are of JSON types."""
    return {**values, SEAL: _hash(values)}


def unseal(values: Any) -> dict[str, Any]:
    """Verifies and removes the checksum.

    Raises:
      ValueError: the checksum does not match or is missing.
    """
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError(f"not a JSON object with a {SEAL}")
    rest = {name: value for name, value in values.items() if name != SEAL}
    if values[SEAL] != _hash(rest):
        raise ValueError(f"changed since it was written ({SEAL} mismatch)")
    return rest


def unseal_if_sealed(values: Any) -> Any:
    """Verifies and removes the checksum, if there is one; files of earlier versions have none.

    Raises:
      ValueError: as `unseal`. Corruption of the name of the checksum passes: check for unknown fields.
    """
    return unseal(values) if isinstance(values, dict) and SEAL in values else values


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
