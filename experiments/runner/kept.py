"""Where results of a run that come after training are kept: in its record, or beside an imported run."""

import dataclasses
import json
from typing import Any

from experiments import cli
from mobilellm_jax.analysis.records import add_entry, read_record
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs import provenance
from mobilellm_jax.storage.checkpoint import newest_intact
from mobilellm_jax.storage.files import AnyPath, locked, write_atomically


def record_of(workdir: AnyPath) -> AnyPath | None:
    """The record of the run in `workdir`; None where it has none."""
    if (workdir / "record.json").exists():
        return workdir / "record.json"
    run = workdir.absolute()
    for parent in run.parents:  # of a sweep, runs/<name> has the record results/<name>.json
        record = parent.parent / "results" / f"{run.relative_to(parent)}.json"
        if parent.name == "runs" and record.exists():
            return record
    return None


def made_with(workdir: AnyPath, config: Config) -> dict[str, Any]:
    """What an entry says of how it was made: the checkpoint of the run, dtype, command and commit."""
    return {
        "step": newest_intact(workdir / "checkpoints")[0],
        "compute_dtype": config.model.compute_dtype,
        "command": cli.command(),
        "git_commit": provenance.git_commit(),
    }


@dataclasses.dataclass(frozen=True)
class Kept:
    """Results of one kind, by name.

    Attributes:
      field: of the record; a run without one has <field>.json in its directory.
      what: the results, for messages.
      again: the verb of making them, for messages.
    """

    field: str
    what: str
    again: str

    def beside(self, workdir: AnyPath) -> AnyPath:
        """The file of a run without a record."""
        return workdir / f"{self.field}.json"

    def path(self, workdir: AnyPath, text: str | None = None) -> AnyPath:
        """The record of the run in `workdir`; where it has none, or on another text, `beside` it."""
        return (None if text else record_of(workdir)) or self.beside(workdir)

    def read(self, path: AnyPath) -> dict[str, Any]:
        """The results by name.

        Raises:
          UserError: the file is damaged.
        """
        if not self._is_beside(path):
            return getattr(read_record(path), self.field) or {}
        if not path.exists():
            return {}
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); delete it to {self.again} again") from None
        if not isinstance(document, dict):
            raise UserError(f"{path}: not {self.what}; delete it to {self.again} again")
        return document

    def check(self, path: AnyPath) -> None:
        """Reads the results once, before work whose result could not be added; errors as in `read`."""
        processes.of_first(lambda: self.read(path) and None)

    def add(self, path: AnyPath, name: str, entry: dict[str, Any]) -> None:
        """Adds one result, atomically; none is lost where several processes add some."""
        if not self._is_beside(path):
            return add_entry(path, self.field, name, entry)
        with locked(path):
            text = json.dumps({**self.read(path), name: entry}, indent=1) + "\n"
            write_atomically(path, text.encode())

    def _is_beside(self, path: AnyPath) -> bool:
        return path.name == f"{self.field}.json"
