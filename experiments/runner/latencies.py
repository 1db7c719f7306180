"""Tables of latency that studies and flags name: the file, and which of its types of weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.base import Study
from experiments import cli
from mobilellm_jax.analysis.latency_table import Table, digest, read_table
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.costs.latency import TIMES, Latency
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import local_directory

_LARGE_ERROR = 0.10  # median over the shapes that a fit did not see


@dataclasses.dataclass(frozen=True)
class NamedTable:
    """A table, and what is predicted from it.

    Attributes:
      name: as it was given, "experiments/latency/my_cpu.json" or with a type of weights, "...json:float32".
    """

    name: str
    table: Table
    latency: Latency

    def field(self, config: Config) -> dict[str, Any]:
        """`Record.latency` of a run."""
        m = config.model
        return {
            "table": self.name,
            "sha256": digest(self.table),
            "device": self.table.title,
            "weights": self.latency.weights or m.compute_dtype,
            "median_error": self.latency.median_errors(m),
            **self.latency.predict(m, config.data.sequence_length),
        }

    def notes(self, designs: Mapping[str, ModelConfig], slots: int) -> list[str]:
        """What is to be said of predictions for these designs."""
        said = f"warning: {self.name}:"
        notes = []
        if self.table.was_busy:
            notes.append(
                f"{said} the machine was not idle when it was measured: the median turn took "
                f"{self.table.busy:.0%} longer than the best"
            )
        errors = {t: e for m in designs.values() for t, e in self.latency.median_errors(m).items()}
        if large := [f"{t} by {e:.0%}" for t, e in errors.items() if e > _LARGE_ERROR]:
            notes.append(
                f"{said} misses shapes that it was not fitted to, in the median, {' and '.join(large)}"
            )
        for label, m in designs.items():
            if outside := self.latency.outside(m, slots):
                notes.append(
                    f"{said} design {label} lies outside of the shapes measured: {'; '.join(outside)}"
                )
        return notes


def named(spec: str) -> NamedTable:
    """Reads the table that a study or a flag names.

    A path that leads to no file from the current folder is taken from this checkout.

    Raises:
      UserError: it cannot be read, or has no such type of weights.
    """
    file, _, weights = spec.partition(":")
    path = local_directory("latency", file)
    if not path.is_file() and not path.is_absolute():
        path = next((there for there in [Path(cli.ROOT) / file] if there.is_file()), path)
    table = read_table(path)
    return NamedTable(spec, table, table.latency(weights or None))


def of_study(spec: str, study: Study) -> NamedTable | None:
    """The table that a study takes its latencies from, None if it names none; `spec` is for messages.

    Raises:
      UserError: it names none but is matched by one, or it cannot be read.
    """
    if not study.latency:
        if study.matched in TIMES:
            raise UserError(
                f"--config={spec}: latency: missing; matched={study.matched!r} needs a table of "
                "experiments.latency"
            )
        return None
    try:
        return named(study.latency)
    except UserError as error:
        raise UserError(f"--config={spec}: latency: {error}") from None
