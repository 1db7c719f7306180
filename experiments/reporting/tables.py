"""The tables of a study: for the terminal, as Markdown and as CSV."""

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reporting import numerals
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, budget_name
from mobilellm_jax.analysis.statistics import interval_of_share
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import (
    format_bound,
    format_difference,
    format_estimate,
    format_p,
    format_score,
    phrase,
)

Columns = dict[str, list[str]]  # header -> one cell for each row
_BUDGETS = {  # in the order shown, which a record does not keep; headers short enough for a terminal
    "total_parameters": "params",
    "embedding_parameters": "embed",
    "non_embedding_parameters": "non-embed",
    "train_flops_per_token": "train FLOP",
    "inference_flops_per_token": "infer FLOP",
    "kv_cache_bytes_per_token": "KV B",
    "decode_bytes_per_token": "decode B",
    "optimizer_bytes": "optim B",
    "activation_bytes": "activ B",
    "decode_ms": "decode ms",  # these two with a table of latency only
    "prefill_ms": "prefill ms",
}
ASPECTS = 6, 320  # width over layers applied, of the paper's models: 62 x 384 and 4 x 1280 of table 11 (125M)


def text(study: Study) -> str:
    """Formats the study's tables for a terminal, below the facts that are equal for all points."""
    lines = [textwrap.fill(line, 110, subsequent_indent="  ") for line in head(study)]
    pairs = [comparisons(study)] if study.verdict.comparisons else []
    pairs += [over_arms] if (over_arms := joint(study)) else []
    for columns in [*designs(study), outcomes(study), *pairs]:
        lines += ["", plain_table(columns)]
    return "\n".join(lines)


def plain_table(columns: Columns) -> str:
    """Formats a table for a terminal, with the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    lines = []
    for first, *rest in [list(columns), *_rows(columns)]:
        cells = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(columns: Columns) -> str:
    """Formats a table as Markdown, with numbers right-aligned, but for the first column."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    _, *others = columns.values()
    rule = "|---" + "".join("|---:" if numerals.are_numbers(cells) else "|---" for cells in others) + "|"
    return "\n".join([row(list(columns)), rule, *map(row, _rows(columns))])


def plain(text: str) -> str:
    """Escapes `text` for one line of Markdown: no markup, links, entities or HTML."""
    escaped = re.sub(r"([\\`*]|<(?=[A-Za-z/!?])|\](?=[(\[:]))", r"\\\1", " ".join(text.split()))
    return re.sub(r"&(?=#?\w+;)", "&amp;", escaped)


def head(study: Study) -> list[str]:
    """Lines above the tables: the question, the matched budget, and the facts that all points share."""
    facts, mismatch, unmatched = study.facts, study.verdict.mismatch, study.verdict.unmatched
    held = budget_name(facts.matched)
    if unmatched is not None:
        held += f", within {max(unmatched, 0.001):.1%}" if unmatched else ", exactly"
    if any(point.is_control for point in study.points.values()):
        held += ", but for the controls"
    rates = {
        "fitted": "fitted for each point",
        "grid": "tuned for each point",
        "transferred": "transferred from another shape",
        "none": "the same for all points, not tuned",
    }
    measure = MEASURES[facts.metric]
    smallest = format_bound(facts.margin, facts.metric)
    smallest += "" if measure.is_share else f" {measure.unit_of_mean}"
    constants = _split(_shapes(study))[1]
    first, *others = study.points.values()
    equal = [name for name in _BUDGETS if others and mismatch.get(name) == 0]
    constants |= {budget_name(name): quantity(first.budgets[name]) for name in equal}
    lines = [
        facts.question,
        f"Held equal: {held}. Learning rate: {rates[facts.tuning]}. "
        f"Smallest difference that matters: {smallest}.",
    ]
    if constants:
        lines.append("The same for all points: " + ", ".join(f"{k} {v}" for k, v in constants.items()) + ".")
    return lines


def designs(study: Study, named: Callable[[str], str] = _BUDGETS.__getitem__) -> list[Columns]:
    """Tables of the shapes of all points, and of all budgets with the mismatch (max / min - 1) as last row.

    A star marks the budget that is held equal. FLOP, KV (key/value cache) and decode bytes are per token.
    Columns that are equal for all points are in `head` instead. `named` gives the header of a budget.
    """
    shapes, _ = _split(_shapes(study))
    points = study.points
    budgets = {"point": [*points]} if len(points) == 1 else {"point": [*points, "mismatch"]}
    for name in [name for name in _BUDGETS if name in study.verdict.mismatch]:
        spread = study.verdict.mismatch[name]
        cells = [quantity(point.budgets[name]) for point in points.values()]
        header = named(name) + (" *" if name == study.facts.matched else "")
        if len(points) == 1:
            budgets[header] = cells
        elif spread:
            budgets[header] = [*cells, f"{spread:.1%}"]
    return [columns for columns in (shapes, budgets) if len(columns) > 1]


def outcomes(study: Study) -> Columns:
    """Results of each point: learning rate, mean ± 95 % interval, noise over seeds, and runs that failed.

    `sensitivity` is the mean increase of the loss at the neighbouring learning rates; "edge" marks an optimum
    at the edge of those tried. `unstable` counts finished runs, with the 95 % interval of their share.
    """
    metric, found = study.facts.metric, study.verdict
    score = MEASURES[metric].column
    names = ["point", "learning rate", "sensitivity", score, "bits/byte", "noise (sd)"]
    names += ["finished", "unstable", "diverged", "failed"]
    columns: Columns = {name: [] for name in names}
    seeds = len({run.seed for point in study.points.values() for run in point.comparison})
    for label, point in study.points.items():
        runs, finished = point.comparison, point.finished
        estimate, search = found.estimates.get(label), found.tuning.get(label)
        noise = found.noise.get(label)
        rate = search.chosen if search else runs[0].learning_rate if runs else math.nan
        bits = _bits_per_byte(finished)
        cells = [
            label,
            ("none" if math.isnan(rate) else f"{rate:.3g}")
            + (" (edge)" if search and search.at_edge else ""),
            "" if search is None or search.sensitivity is None else _sensitivity(search.sensitivity),
            format_estimate(estimate, metric) if estimate else "none",
            "" if bits is None else f"{bits:.4f}",
            "" if noise is None else format_score(noise, metric),
            f"{len(finished)}/{seeds}",
            _share(len(found.unstable.get(label, ())), len(finished)),
            *(str(sum(run.status == word for run in runs)) for word in ("diverged", "failed")),
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    said = {name: cells for name, cells in columns.items() if set(cells) - {"", "0"}}
    return {"point": columns["point"], **said}


def comparisons(study: Study) -> Columns:
    """Table of all pairs: difference (first - second), with interval and p for all pairs at once; verdict.

    Where there are arms, each pair is of one arm, and is corrected for the pairs of that arm.
    """
    metric, found = study.facts.metric, study.verdict.comparisons
    unit = MEASURES[metric].column_of_differences
    return {
        "pair": [f"{c.point} against {c.other}" for c in found],
        "seeds": [_counts(c) for c in found],
        f"difference ({unit})": [
            format_difference(c.difference, metric) if c.difference else "" for c in found
        ],
        "p, all pairs": [_p(c.p_value) for c in found],
        "verdict": [phrase(c, metric) for c in found],
    }


def _counts(c: Comparison) -> str:
    return "/".join(map(str, dict.fromkeys(c.difference.seeds))) if c.difference else "0"


def joint(study: Study) -> Columns | None:
    """Table of the words of all arms about each pair of designs; None unless there are several arms."""
    found = study.verdict.joint
    if not found:
        return None
    arms = [family.arm or "" for family in study.verdict.families]
    return {
        "designs": [f"{pair.design} against {pair.other}" for pair in found],
        **{arm: [pair.words.get(arm, "not compared") for pair in found] for arm in arms},
        "together": [pair.word for pair in found],
    }


def zero_shot(study: Study) -> Columns | None:
    """Zero-shot accuracies in percent, acc / acc_norm, means over the seeds; None without any.

    One column for each task (with the number of questions; another number of them is another column), and
    the average over the columns of the points that have all of them.
    """
    runs = [run for point in study.points.values() for run in point.finished if run.zero_shot]
    metrics = ("acc", "acc_norm")
    found: dict[tuple[str, int, str], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        for task, entry in sorted((run.zero_shot or {}).items()):
            if all(metric in entry["metrics"] for metric in metrics):
                column = found.setdefault((task, entry["items"], entry["data"]), {})
                column.setdefault(run.point, []).append(entry)
    if not found:
        return None
    points = list(dict.fromkeys(run.point for run in runs))
    columns: Columns = {"point": [*points, "chance", "majority"]}
    means: dict[str, list[list[float]]] = {point: [] for point in points}
    for (task, items, data), of_points in found.items():
        name = f"{task} ({items:,})"
        cells = []
        for point in points:
            entries = of_points.get(point, [])
            if entries:
                values = [[entry["metrics"][metric]["value"] for entry in entries] for metric in metrics]
                means[point].append([float(np.mean(of_metric)) for of_metric in values])
            cells.append(_shares(means[point][-1]) if entries else "")
        one = next(iter(of_points.values()))[0]
        cells += [_shares([one[baseline]]) for baseline in ("chance", "majority")]
        columns[name if name not in columns else f"{name}, {data}"] = cells
    if len(found) > 1:
        complete = [len(means[point]) == len(found) for point in points]
        columns["average"] = [
            _shares(np.mean(means[point], axis=0).tolist()) if ok else ""
            for point, ok in zip(points, complete, strict=True)
        ] + ["", ""]
    return columns


def _shares(shares: Sequence[float | None]) -> str:
    return " / ".join("" if share is None else f"{100 * share:.1f}" for share in shares)


def csv_text(study: Study) -> str:
    """One row for each point, with every number in full precision, in the metric itself."""
    facts, found, rows = study.facts, study.verdict, []
    for label, point in study.points.items():
        runs, rate = point.comparison, point.runs[0].learning_rate
        estimate, search = found.estimates.get(label), found.tuning.get(label)
        spread = found.spread.points.get(label)
        rows.append(
            {
                "study": facts.study,
                "preset": facts.preset,
                "point_index": point.index,
                "point": label,
                "x_label": point.x and point.x["label"],
                "x": point.x and point.x["value"],
                "overrides": json.dumps(point.overrides, sort_keys=True),
                "layer_plan": " ".join(map(str, point.layer_plan)),
                **{f"model.{name}": value for name, value in sorted(point.config["model"].items())},
                **{f"parameters_{name}": value for name, value in sorted(point.parameters.items())},
                "aspect_ratio": aspect_ratio(point),
                **{name: point.budgets[name] for name in _BUDGETS if name in point.budgets},
                "steps": max((r.steps for r in runs), default=None),
                "tokens_seen": max((r.tokens_seen for r in runs), default=None),
                "learning_rate": search.chosen if search else rate,
                "learning_rate_at_edge": search and search.at_edge,
                "learning_rate_sensitivity": search and search.sensitivity,
                "learning_rate_curve": search and json.dumps(search.curve),
                **{f"runs_{s}": sum(r.status == s for r in runs) for s in ("finished", "diverged", "failed")},
                "runs_unstable": len(found.unstable.get(label, ())),
                "metric": facts.metric,
                "score_of_seed": json.dumps(point.scores),
                "score_mean": estimate and estimate.mean,
                "score_interval_half_width": estimate and estimate.half_width,
                "score_sd_over_seeds": found.noise.get(label),
                "score_sd_moderated": math.sqrt(spread.variance) if spread else None,
                "bits_per_byte_mean": _bits_per_byte(point.finished),
            }
        )
    return to_csv(rows)


def comparisons_csv(study: Study) -> str:
    """One row for each pair asked about, with every number in full precision, in the metric."""
    facts, words = study.facts, {(pair.design, pair.other): pair.word for pair in study.verdict.joint}
    rows = [
        {
            "study": facts.study,
            "preset": facts.preset,
            "metric": facts.metric,
            "margin": facts.margin,
            "point": c.point,
            "other": c.other,
            "design": c.designs[0],
            "other_design": c.designs[1],
            "arm": c.arm,
            "seeds": c.difference.seeds[0] if c.difference else 0,
            "other_seeds": c.difference.seeds[1] if c.difference else 0,
            "difference": c.difference and c.difference.mean,
            "difference_se": c.difference and c.difference.se,
            "difference_df": c.difference and c.difference.df,
            "difference_low": c.difference and c.difference.low,
            "difference_high": c.difference and c.difference.high,
            "p_value_all_pairs": c.p_value,
            "verdict": c.word,
            "phrase": phrase(c, facts.metric),
            "not_worse": c.not_worse,
            "verdict_of_all_arms": words.get(c.designs),
        }
        for c in study.verdict.comparisons
    ]
    return to_csv(rows)


def quantity(number: float) -> str:
    """Formats three digits and a decimal prefix: 2048000 -> "2.05 M"."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def aspect_ratio(point: Point) -> float:
    """Width over the layers applied, D/L."""
    return point.config["model"]["width"] / len(point.layer_plan)


def is_outside(aspect: float) -> bool:
    """True if D/L is none that the paper covers."""
    return not ASPECTS[0] <= aspect <= ASPECTS[1]


def _shapes(study: Study) -> Columns:
    points = study.points.values()
    settings = {"width": "width", "heads": "num_heads", "kv heads": "num_kv_heads", "ffn": "ffn_width"}
    return {
        "point": [label + " (control)" * p.is_control for label, p in study.points.items()],
        "blocks": [str(point.config["model"]["depth"]) for point in points],
        "layers": [str(len(point.layer_plan)) for point in points],
        **{name: [str(p.config["model"][field]) for p in points] for name, field in settings.items()},
        "D/L": [f"{aspect_ratio(p):.3g}{' (outside)' * is_outside(aspect_ratio(p))}" for p in points],
        "tokens": [quantity(max(run.tokens_seen for run in point.runs)) for point in points],
    }


def _split(columns: Columns) -> tuple[Columns, dict[str, str]]:
    """Splits off the columns, other than the first, that are equal in all of several rows."""
    first = next(iter(columns))
    constant = {
        name: cells[0]
        for name, cells in columns.items()
        if name != first and len(cells) > 1 and len(set(cells)) == 1
    }
    return {name: cells for name, cells in columns.items() if name not in constant}, constant


def _share(count: int, total: int) -> str:
    if not count:
        return "0"
    low, high = interval_of_share(count, total)
    return f"{count} ({100 * low:.0f} to {100 * high:.0f} %)"


def _p(value: float | None) -> str:
    return "" if value is None else format_p(value).removeprefix("= ")


def _sensitivity(value: float) -> str:
    return "+" + format_score(value, "loss") if math.isfinite(value) else "diverges"


def _bits_per_byte(finished: Sequence[Record]) -> float | None:
    values = [run.final["bits_per_byte"] for run in finished if run.final is not None]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(finished) else None


def _rows(columns: Columns) -> list[list[str]]:
    return [list(row) for row in zip(*columns.values(), strict=True)]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows, each from column to value, as CSV with a header."""
    file = io.StringIO()
    writer = csv.DictWriter(
        file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
