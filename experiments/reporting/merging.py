"""Records of one workdir copied into another: all of them, or none."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.facts import facts_of
from mobilellm_jax.analysis.records import Record, by_study, read_record
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import files_below

_SHOWN = 5  # conflicts in a message


@dataclasses.dataclass(frozen=True)
class Merge:
    """What a merge would do.

    Attributes:
      new: names of the runs to copy, paths below results/ without ".json".
      same: names of the runs that both have, with equal records.
      warnings: of the studies that get records, see `comparable.check_comparable`.
    """

    new: list[str]
    same: list[str]
    warnings: list[str]


def plan(source: Path, target: Path) -> Merge:
    """Compares the records below `source`/results and `target`/results.

    Raises:
      UserError: a record is corrupt (checksum mismatch), there is none to copy from, a run of this name has
        another record in the other directory, or the runs of a study cannot be compared.
    """
    here, there = _records(target), _records(source)
    if not there:
        raise UserError(f"{source}/results: no records of runs (*.json); nothing to merge")
    same = [name for name in there if here.get(name) == there[name]]
    conflicts = [
        f"{name} ({', '.join(_differences(here[name], there[name]))})"
        for name in there
        if name in here and name not in same
    ]
    if conflicts:
        more = f" and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
        raise UserError(
            f"{len(conflicts)} runs have other records in {target} than in {source}: "
            f"{'; '.join(conflicts[:_SHOWN])}{more}; nothing was copied. Delete one of the two of each, or "
            "compare the workdirs by experiments.report --against"
        )
    new = [name for name in there if name not in here]
    changed = {(there[name].study, there[name].preset) for name in new}
    warnings = []
    for study, records in by_study([*here.values(), *(there[name] for name in new)]).items():
        if study in changed:
            warnings += check_comparable(facts_of(records), records)
    return Merge(new, same, list(dict.fromkeys(warnings)))


def copy(names: list[str], source: Path, target: Path) -> None:
    """Copies the records of these runs, byte for byte; none of them may be in `target`.

    Raises:
      UserError: a record cannot be read or written, or is there by now; nothing was copied.
    """
    made: list[Path] = []
    temporary: dict[Path, Path] = {}
    try:
        for name in names:
            path = target / "results" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with open(temporary[path], "wb") as file:
                file.write((source / "results" / f"{name}.json").read_bytes())
                file.flush()
                os.fsync(file.fileno())
            read_record(temporary[path])  # it may have changed since it was compared
        for path, written in temporary.items():
            os.link(written, path)  # unlike a rename, it replaces nothing
            made.append(path)
    except (OSError, UserError) as error:
        for path in made:
            path.unlink(missing_ok=True)
        raise UserError(f"{target}/results: {error}; nothing was copied") from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def _records(workdir: Path) -> Mapping[str, Record]:
    """All records below results/, by the name of the run."""
    results = workdir / "results"
    paths = [path for path in files_below(results) if path.suffix == ".json"]
    return {path.relative_to(results).with_suffix("").as_posix(): read_record(path) for path in paths}


def _differences(one: Record, other: Record) -> list[str]:
    """Names of up to three fields that differ."""
    names = [field.name for field in dataclasses.fields(Record)]
    found = [name for name in names if getattr(one, name) != getattr(other, name)]
    return [*found[:3], *(["..."] if len(found) > 3 else [])]
