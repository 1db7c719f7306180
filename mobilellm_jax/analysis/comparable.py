"""Comparability of runs: fields that must be equal, fields that may differ, and warnings."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mobilellm_jax.analysis.facts import Facts
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.config import DECISIVE, IDLE, SEEDS
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath


def data_hashes(card: Mapping[str, Any], rows: bool = False) -> dict[str, str | None]:
    """Hashes in a data card: source, held-out source, tokenizer and, with `rows`, the rows of each split."""
    hashes = {name: value for name, value in card.items() if name.endswith("sha256")}
    splits = card.get("splits", {}) if rows else {}
    return hashes | {f"{split}_rows_sha256": entry["sha256"] for split, entry in splits.items()}


def data_changes(there: Mapping[str, Any], here: Mapping[str, Any], rows: bool = False) -> str:
    """Describes the hashes that differ between two data cards; "" if all that both have are equal."""
    old, new = data_hashes(there, rows), data_hashes(here, rows)
    changes = [
        f"{name.replace('_', ' ')} {_short(old[name])} -> {_short(new[name])}"
        for name in old
        if name in new and old[name] != new[name]
    ]
    texts = " -> ".join(dict.fromkeys([text_name(there), text_name(here)]))
    return f"{', '.join(changes)} ({texts})" if changes else ""


def data_card(record: Record) -> dict[str, Any]:
    """Data card of a record; source and Python version are filled in from the run if the card lacks them."""
    card = {"source": record.setting("data.source"), **record.data}
    return {**card, "python_version": card.get("python_version") or record.versions.get("python")}


def text_name(card: Mapping[str, Any]) -> str:
    """Source in a data card; for the bundled text, with the Python version that contains it."""
    source, version = card.get("source", "unknown source"), card.get("python_version")
    return f"{source} of Python {version}" if source == "bundled" and version else source


def leakage(card: Mapping[str, Any]) -> str | None:
    """Warning that held-out documents are in the training text as well; None if none are."""
    count = card.get("held_out_documents_in_train", 0)
    if not count:
        return None
    total = sum(entry["documents"] for name, entry in card["splits"].items() if name != "train")
    return (
        f"{count:,} of {total:,} held-out documents ({count / total:.1%}) are in the training text as well."
    )


def repetition(runs: Sequence[Record]) -> str | None:
    """Warning that training went through the text more than once; None if none of the runs did."""
    splits = [(run, run.data.get("splits", {}).get("train", {})) for run in runs]
    times = max((run.tokens_seen / of["tokens"] for run, of in splits if of.get("tokens")), default=0.0)
    if times <= 1:
        return None
    return f"The training text was seen {times:.2f} times: it is not all new."


def _one_protocol(facts: Facts, runs: Sequence[Record]) -> None:
    """Raises UserError if some runs have planned seeds or fitted rates, and some do not."""
    compared = [run for run in runs if run.phase == "comparison"]
    for what, asked, follows in (
        ("a plan", compared, lambda run: run.plan is not None),
        ("a fitted learning rate", runs, lambda run: run.tuning == "fitted"),
    ):
        has, lacks = ([run for run in asked if follows(run) is wanted] for wanted in (True, False))
        if has and lacks:
            raise UserError(
                f"{facts.study}:{facts.preset}: records of two protocols: {len(has)}, such as {has[0].name}, "
                f"have {what}, and {len(lacks)}, such as {lacks[0].name}, do not; one verdict cannot be made "
                "of both: delete the older records, or use separate --workdirs"
            )


def check_same_data(path: AnyPath, record: Record, card: Mapping[str, Any]) -> None:
    """Raises UserError unless the data of `record`, read from `path`, match the data card."""
    if changes := data_changes(data_card(record), card):
        raise UserError(
            f"{path}: the run used other data: {changes}; runs on different data cannot be compared: "
            "restore the data, or use another --workdir"
        )


def check_comparable(facts: Facts, runs: Sequence[Record]) -> list[str]:
    """Checks that the runs of one study and preset differ only in fields that the study allows to differ.

    Scientific fields may differ between points. Tuned nuisance fields may differ between points and between
    tuning runs, but not between the comparison runs of one point. The hashes of data and tokenizer must be
    equal.

    Returns:
      Warnings: different code, libraries or devices; a study that was changed between the runs; tuning under
      other conditions than the comparison; held-out documents in the training text; more than one epoch.

    Raises:
      UserError: different data, tokenizer, metric, sequence length, batch or steps; comparison runs of one
        point with different learning rates; one run twice; one label for two designs; records of two
        protocols. The message names the runs and the values.
    """
    _one_protocol(facts, runs)
    warnings = []
    seen: dict[tuple[bool, str], dict[str, list[Record]]] = {}
    phases: dict[str, dict[str, set[str]]] = {}
    varied = set(facts.scientific).union(*(run.overrides for run in runs))
    for run in runs:
        for name, value, decisive in _facts(run, facts, varied):
            if _may_differ_in_tuning(name):
                phases.setdefault(name, {}).setdefault(run.phase, set()).add(str(value))
                name = name if run.phase == "comparison" else f"{name} of the tuning runs"
            seen.setdefault((decisive, name), {}).setdefault(str(value), []).append(run)
    for (decisive, name), of_value in seen.items():
        if decisive and len(of_value) > 1:
            a, b = (f"{value} in {_where(found[0], name)}" for value, found in list(of_value.items())[:2])
            raise UserError(
                f"{facts.study}:{facts.preset}: {name} is {a}, but {b}; "
                "such runs cannot be compared: rerun them under equal conditions, or use separate --workdirs"
            )
        if len(of_value) > 1:
            counts = ", ".join(f"{value} ({len(found)} runs)" for value, found in of_value.items())
            warnings.append(f"The runs differ in {name}: {counts}.")
    for name, values in phases.items():
        tuned, compared = (", ".join(sorted(values.get(p, ()))) for p in ("tuning", "comparison"))
        intended = name == "train.eval_split"  # rates are chosen on other documents
        if name.startswith("train.") and not intended and tuned and compared and tuned != compared:
            warnings.append(f"{name} was {tuned} in tuning, but {compared} in the comparison.")
    warnings += dict.fromkeys(filter(None, (leakage(run.data) for run in runs)))
    warnings += filter(None, [repetition(runs)])
    warnings += _other_pairs(facts, runs)
    (identity, count), *_ = Counter(map(_identity, runs)).most_common()
    if count > 1:
        raise UserError(f"{facts.study}:{facts.preset}: {count} records of {identity}; delete all but one")
    return warnings


def _may_differ_in_tuning(fact: str) -> bool:
    """True if tuning runs, equal among themselves, may have another value than comparison runs."""
    return fact.startswith("train.") or fact in ("steps", "tokens seen")


def _short(sha256: str | None) -> str:
    return str(sha256)[:12]


def _where(record: Record, fact: str) -> str:
    return (
        f"{record.name} ({text_name(data_card(record))})"
        if fact == "source_sha256 of the data"
        else record.name
    )


def _identity(record: Record) -> str:
    trial = [f"{name} {record.setting(name):g}" for name in record.nuisance if record.phase == "tuning"]
    return " ".join([record.name, *(["in tuning at", ", ".join(trial)] if trial else [])])


def _other_pairs(facts: Facts, runs: Sequence[Record]) -> Iterator[str]:
    """Warns if a record lacks a pair of its point that another record of the study has."""
    asked: dict[str, set[tuple[str, str]]] = {}
    for pair in facts.pairs:
        for point in pair:
            asked.setdefault(point, set()).add(pair)
    other = [r for r in runs if not asked.get(r.point, set()) <= {(a, b) for a, b in r.pairs}]
    if other:
        yield (
            f"The runs differ in pairs: {len(other)} of {len(runs)} runs, such as {other[0].name}, do not "
            "ask for every comparison of their point that others ask for. All are made, and corrected for."
        )


def _facts(record: Record, facts: Facts, varied: set[str]) -> Iterator[tuple[str, object, bool]]:
    """Yields (name, value, True if a difference is an error) for everything that runs should have in common.

    Args:
      record: one of the runs.
      facts: of the study.
      varied: settings that may differ by design.
    """
    scientific, nuisance = set(facts.scientific), set(facts.nuisance)
    if facts.tuning != "none":
        varied = varied | nuisance
    free = scientific | IDLE
    design = {k: v for k, v in sorted(record.overrides.items()) if k not in SEEDS | nuisance}
    yield f"the design of {record.point!r}", design, True
    yield "metric", record.metric, True
    if record.phase == "comparison":
        yield from (
            (f"{name} of the comparison runs of {record.point!r}", record.setting(name), True)
            for name in record.nuisance
        )
    yield from ((f"{name} of the data", value, True) for name, value in data_hashes(record.data).items())
    if record.status == "finished" and not scientific & {"train.steps", "train.batch_size"}:
        yield "steps", record.steps, True
        yield "tokens seen", record.tokens_seen, True
    if "eval_split" not in record.config["train"]:  # held out before there was text for tuning
        yield "train.eval_split", "not recorded", True
    if record.parent and "train.init_from" not in scientific:
        yield "sha256 of the parent", record.parent["manifest_sha256"], True
    if record.teacher and "train.teacher" not in scientific:
        yield "sha256 of the teacher", record.teacher["manifest_sha256"], True
    if record.latency:
        yield "sha256 of the table of latency", record.latency["sha256"], False
    for group, settings in record.config.items():
        for field, value in settings.items():
            name = f"{group}.{field}"
            is_decisive = name in DECISIVE
            if name not in free and (is_decisive or name not in varied):
                yield name, value, is_decisive
    yield "git commit", record.git_commit, False
    yield "device", record.device_name, False
    yield from ((f"{library} version", version, False) for library, version in record.versions.items())
    for name in ("question", "matched", "scientific", "nuisance", "tuning", "margin"):
        yield name, getattr(record, name), False
