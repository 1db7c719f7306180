"""Tables of latency: what was measured, where and how, and what was fitted to it, as one JSON."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.costs import latency
from mobilellm_jax.costs.latency import TIMES, Fit, Latency
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import path_of, write_atomically
from mobilellm_jax.storage.sealed import SEAL, parse, seal, unseal
from mobilellm_jax.validation import from_mapping

SCHEMA = 2
_IDLE = 0.1  # medians are this far above minima, at most, on a machine without other work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One shape, measured.

    Attributes:
      fields: of the model, those that differ from the table's base.
      slots: of the cache; the prompt has half as many tokens.
      decode_ms, prefill_ms: the fastest turn, which other work on the machine delays least.
      decode_median_ms, prefill_median_ms: the median turn.
    """

    fields: dict[str, Any]
    slots: int
    decode_ms: float
    prefill_ms: float
    decode_median_ms: float
    prefill_median_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """All that was measured on one device with one program.

    Attributes:
      schema: version of this layout.
      program: what was measured.
      device, threads: where; `device` as in records.
      versions, git_commit, command, created: as in records.
      base: all fields of the model that the measured shapes vary.
      points: shapes by type of the weights.
      fits: by type of the weights, by name of the time: the fields of `latency.Fit`.
    """

    schema: int = SCHEMA
    program: str
    device: dict[str, str | int]
    threads: int
    versions: dict[str, str]
    git_commit: str | None
    command: str
    created: str
    base: dict[str, Any]
    points: dict[str, list[Any]]
    fits: dict[str, Any]

    @property
    def title(self) -> str:
        """The device, for people."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.device['kind']}, {threads}, {self.program}"

    @property
    def busy(self) -> float:
        """How far the median turn of a shape is above its fastest one, as a median over the shapes."""
        return float(
            np.median(
                [
                    point[f"{time.removesuffix('_ms')}_median_ms"] / point[time] - 1
                    for points in self.points.values()
                    for point in points
                    for time in TIMES
                ]
            )
        )

    @property
    def was_busy(self) -> bool:
        """True if other work on the machine seems to have slowed the measurement down."""
        return self.busy > _IDLE

    def latency(self, weights: str | None = None) -> Latency:
        """The fitted model, for a type of the weights; None: that of the compute dtype of each model.

        Raises:
          UserError: there is no such type.
        """
        fits = {
            kind: {time: _fit_of(of) for time, of in by_time.items()} for kind, by_time in self.fits.items()
        }
        if weights is not None and weights not in fits:
            raise UserError(f"latency: weights in {weights!r} were not measured; measured: {', '.join(fits)}")
        return Latency(fits, weights)


def _fit_of(fields: Mapping[str, Any]) -> Fit:
    """A fit from JSON, which has no tuples."""
    ranges = {name: (float(low), float(high)) for name, (low, high) in fields["ranges"].items()}
    return Fit(fields["coefficients"], ranges, tuple(fields["errors"]), fields["cache_mb"])


def fitted(points: Mapping[str, Sequence[Measured]], base: ModelConfig) -> dict[str, dict[str, Fit]]:
    """Fits both times, for each type of the weights; errors as in `latency.fit`."""
    found: dict[str, dict[str, Fit]] = {}
    for kind, measured in points.items():
        models = [dataclasses.replace(base, **point.fields) for point in measured]
        found[kind] = {
            time: latency.fit(
                [latency.features(time, m, p.slots, kind) for m, p in zip(models, measured, strict=True)],
                [getattr(point, time) for point in measured],
                models,
            )
            for time in TIMES
        }
    return found


def write_table(table: Table, path: str | os.PathLike[str]) -> None:
    """Writes a table atomically, each point on a line; UserError if that fails."""
    text = json.dumps(seal(dataclasses.asdict(table)), indent=1, allow_nan=False)
    text = re.sub(r"(?<=\n   )\{\n.*?\n   \}", lambda found: re.sub(r"\s+", " ", found[0]), text, flags=re.S)
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    write_atomically(path, (text + "\n").encode())


def read_table(path: str | os.PathLike[str]) -> Table:
    """Reads a table.

    Raises:
      UserError: it is missing, corrupt, or of another schema; the message names the file.
    """
    try:
        fields = unseal(parse(path_of(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a table of latency: {error}; make one with: "
            f"python -m experiments.latency --out={path}"
        ) from None
    if fields.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema: version {fields.get('schema')!r} is unknown; known: {SCHEMA}")
    return from_mapping(Table, fields, f"{path}: ")


def digest(table: Table) -> str:
    """The sha256 of a table, as its file ends with; it tells tables apart."""
    return seal(dataclasses.asdict(table))[SEAL]
