"""Tables of what trained models say: API calls and instructions, and the paper's tables beside them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.reporting import paper_tables
from experiments.reporting.tables import Columns
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.statistics import Estimate, mean_and_interval
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.wording import format_estimate

CALLS = (
    "Greedy decoding after true conversations: shares of calls that are a JSON object, that have the right "
    "name, also the right names of slots, and are right as a whole, and the overlap of the other replies "
    "with the true ones. All in percent, means over the seeds, ± a 95 % t interval."
)
RULES = (
    "Shares of replies that keep an instruction which a program can check, in percent, means over the seeds, "
    "± a 95 % t interval. A reply that keeps a rule may be nonsense, so beside it stand its words, the share "
    "of empty replies, and of triples of words that stood in the same reply before."
)
_METRICS = {
    "json": "JSON",
    "intent": "intent",
    "slots": "slot names",
    "call": "whole call",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
}
_SPLIT = "combinations"  # calls that are new as a whole; the paper's test is nearest to it
# What the paper's columns are called, and ours that stand in their place.
_TABLE_6 = {"EM_intent": "intent", "EM_structure": "call", "Rouge1": "rouge1", "RougeL": "rougeL"}
_BESIDE = {
    "api_calls": (
        "Table 6 of the paper, in percent, and ours on the split of new combinations. Nothing in it can be "
        "compared but the order of a column within one side: the paper's 5,000 conversations and its intents "
        'were not published, its "structure" is not defined, and whole calls stand in its place here; its '
        "models were pretrained, and ours are thousands of times smaller. ROUGE is of the replies that are "
        "no calls. The paper's numbers are those of notes by others."
    ),
    "chat": (
        "Table 5 of the paper: MT-Bench, from 1 to 10, and the share of AlpacaEval's questions on which "
        "GPT-4 prefers the answer to that of text-davinci-001. Neither judge is here and none stands in for "
        "it: the longer answer wins in 80 % of 15,203 published verdicts of GPT-4 on AlpacaEval, so that a "
        "proxy would count words. Ours are the held-out loss on replies and the mean share of instructions "
        "kept, which compare our designs with each other and nothing else. `experiments.chat --questions "
        "--answers` writes what the judges read. The paper's numbers are those of notes by others."
    ),
}


def calls(study: Study) -> Columns:
    """One row for each point and split; {} if no run was asked for calls."""
    rows = [
        {
            "point": label,
            "conversations": name,
            "calls": f"{entries[0]['calls']:,}",
            "seeds": str(len(entries)),
            **{head: _percent(_values(entries, metric)) for metric, head in _METRICS.items()},
        }
        for label, name, entries in _entries(study, "calls")
    ]
    return _columns(rows)


def rules(study: Study) -> Columns:
    """One row for each point and rule; {} if no run was given instructions."""
    rows = [
        {
            "point": label,
            "rule": name,
            "prompts": str(entries[0]["prompts"]),
            "seeds": str(len(entries)),
            "kept": _percent([entry["kept"] for entry in entries]),
            **_style(entries),
        }
        for label, name, entries in _entries(study, "instructions")
    ]
    return _columns(rows)


def beside_paper(study: Study) -> tuple[str, Columns] | None:
    """What can and cannot be compared, and our points above the paper's rows; None for other studies."""
    name = study.facts.study
    if name not in _BESIDE:
        return None
    ours = _our_calls(study) if name == "api_calls" else _our_chat(study)
    table, theirs = (
        ("table06_api_calling", {column: _METRICS[metric] for column, metric in _TABLE_6.items()})
        if name == "api_calls"
        else ("table05_chat", {"MT_Bench": "MT-Bench", "AlpacaEval_win_pct": "AlpacaEval, %"})
    )
    paper = [
        {"of": "paper", "point": row["model"], **{head: row[column] for column, head in theirs.items()}}
        for row in paper_tables.table(table)
    ]
    return _BESIDE[name], _columns([*ours, *paper])


def _our_calls(study: Study) -> list[dict[str, str]]:
    return [
        {
            "of": f"ours, {study.facts.preset}",
            "point": label,
            **{_METRICS[metric]: _percent(_values(entries, metric)) for metric in _TABLE_6.values()},
        }
        for label, name, entries in _entries(study, "calls")
        if name == _SPLIT
    ]


def _our_chat(study: Study) -> list[dict[str, str]]:
    metric, rows = study.facts.metric, []
    for label, estimate in study.verdict.estimates.items():
        asked = [of for of in (run.instructions for run in study.points[label].finished) if of]
        kept = [_mean([entry["kept"] for entry in of.values()]) for of in asked]
        entries = [entry for of in asked for entry in of.values()]
        rows.append(
            {
                "of": f"ours, {study.facts.preset}",
                "point": label,
                MEASURES[metric].column: format_estimate(estimate, metric),
                **({"instructions kept, %": _percent(kept), **_style(entries)} if asked else {}),
            }
        )
    return rows


def _entries(study: Study, field: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Label of each point, name of what it was asked, and the entries of its runs."""
    for label, point in study.points.items():
        found: dict[str, list[dict[str, Any]]] = {}
        for run in point.finished:
            for name, entry in (getattr(run, field) or {}).items():
                found.setdefault(name, []).append(entry)
        for name, entries in found.items():
            yield label, name, entries


def _values(entries: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [entry["metrics"][metric]["value"] for entry in entries if metric in entry["metrics"]]


def _style(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    words, empty, repeated = (
        _mean([entry[name] for entry in entries]) for name in ("words", "empty", "repeated")
    )
    return {"words": f"{words:.1f}", "empty, %": f"{100 * empty:.1f}", "repeated, %": f"{100 * repeated:.1f}"}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(values: Sequence[float]) -> str:
    """Mean and interval of shares; "" without one."""
    if not values:
        return ""
    of: Estimate = mean_and_interval(values)
    return f"{100 * of.mean:.1f}" + ("" if of.half_width is None else f" ± {100 * of.half_width:.1f}")


def _columns(rows: Sequence[Mapping[str, str]]) -> Columns:
    """The rows as columns; cells that a row does not have are empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, "") for row in rows] for name in names}
