"""The table of a study, from its records: for the terminal, as Markdown and as CSV."""

import csv
import io
import json
import textwrap
from collections.abc import Sequence

import numpy as np

from mobilellm_jax.results import Record, by_point, newest
from mobilellm_jax.statistics import Verdict, format_difference, format_estimate, format_p

Columns = dict[str, list[str]]  # header -> one cell for each point


def text(records: Sequence[Record], verdict: Verdict) -> str:
    """Returns the study's tables for a terminal; facts that are equal for all points stand above them."""
    head, tables = _content(records, verdict)
    lines = [textwrap.fill(line, 110, subsequent_indent="  ", break_on_hyphens=False) for line in head]
    for columns in tables:
        widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
        lines.append("")
        for row in [list(columns), *_rows(columns)]:
            cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(records: Sequence[Record], verdict: Verdict) -> str:
    """Returns the same tables as Markdown."""
    head, tables = _content(records, verdict)
    lines = ["  \n".join(head)]
    for columns in tables:
        lines += ["", _markdown_row(list(columns)), "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += [_markdown_row(row) for row in _rows(columns)]
    return "\n".join(lines)


def csv_text(records: Sequence[Record], verdict: Verdict) -> str:
    """Returns one row for each point, with every number in full precision."""
    rows = []
    for point, runs in by_point(records).items():
        run = runs[0]
        finished = [r for r in runs if r.status == "finished"]
        estimate, comparison = verdict.estimates.get(point), verdict.comparisons.get(point)
        difference = comparison and comparison.difference
        rows.append(
            {
                "study": run.study,
                "preset": run.preset,
                "point_index": run.point_index,
                "point": point,
                "x_label": run.x and run.x["label"],
                "x": run.x and run.x["value"],
                "overrides": json.dumps(run.overrides, sort_keys=True),
                "layer_plan": " ".join(map(str, run.layer_plan)),
                **{f"model.{name}": value for name, value in sorted(run.config["model"].items())},
                **{f"parameters_{name}": value for name, value in sorted(run.parameters.items())},
                **{f"flops_per_token_{name}": value for name, value in sorted(run.flops_per_token.items())},
                "steps": max(r.steps for r in runs),
                "tokens_seen": max(r.tokens_seen for r in runs),
                **{f"runs_{s}": sum(r.status == s for r in runs) for s in ("finished", "diverged", "failed")},
                "loss_of_seed": json.dumps({r.seed: r.loss for r in finished}),
                "loss_mean": estimate and estimate.mean,
                "loss_interval_half_width": estimate and estimate.half_width,
                "bits_per_byte_mean": _bits_per_byte(finished),
                "reference": verdict.reference,
                "difference": difference and difference.mean,
                "difference_low": difference and difference.low,
                "difference_high": difference and difference.high,
                "difference_seeds": difference and difference.n,
                "p_value": difference and difference.p_value,
                "holm_p_value": comparison and comparison.holm_p,
                "verdict": comparison and comparison.word,
            }
        )
    file = io.StringIO()
    writer = csv.DictWriter(
        file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def quantity(number: float) -> str:
    """Returns three digits and a decimal prefix: 2048000 -> "2.05 M"."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def _content(records: Sequence[Record], verdict: Verdict) -> tuple[list[str], list[Columns]]:
    """Returns the lines above the tables, and the tables: the designs, and what came out."""
    facts = newest(records)
    designs, constants = _without_constants(_designs(records))
    constants.pop("deviation", None)
    head = [facts.question, f"Held equal: {facts.matched}."]
    if constants:
        head.append("The same for all points: " + ", ".join(f"{k} {v}" for k, v in constants.items()) + ".")
    tables = [designs, _outcomes(records, verdict)]
    return head, [columns for columns in tables if len(columns) > 1]


def _designs(records: Sequence[Record]) -> Columns:
    points = by_point(records)
    runs = [runs[0] for runs in points.values()]
    first = runs[0].parameters["non_embedding"]
    tokens = [max(run.tokens_seen for run in runs) for runs in points.values()]
    settings = {"width": "width", "heads": "num_heads", "kv heads": "num_kv_heads", "ffn": "ffn_width"}
    return {
        "point": list(points),
        "blocks": [str(run.setting("model.depth")) for run in runs],
        "layers": [str(len(run.layer_plan)) for run in runs],
        **{name: [str(run.setting(f"model.{field}")) for run in runs] for name, field in settings.items()},
        "parameters": [f"{run.parameters['total']:,}" for run in runs],
        "non-embedding": [f"{run.parameters['non_embedding']:,}" for run in runs],
        "deviation": [f"{100 * (run.parameters['non_embedding'] / first - 1):+.2f} %" for run in runs],
        "train FLOPs/token": [quantity(run.flops_per_token["train"]) for run in runs],
        "tokens": [quantity(count) for count in tokens],
    }


def _outcomes(records: Sequence[Record], verdict: Verdict) -> Columns:
    seeds = len({record.seed for record in records})
    columns: Columns = {name: [] for name in ("point", "finished", "loss (nats/token)", "bits/byte")}
    is_best = verdict.reference == verdict.best
    against = f"against {'the best' if is_best else 'the baseline'}"
    columns |= {against: [], "Holm p": [], "verdict": []}
    for point, runs in by_point(records).items():
        finished = [run for run in runs if run.status == "finished"]
        estimate, comparison = verdict.estimates.get(point), verdict.comparisons.get(point)
        difference = comparison and comparison.difference
        bits = _bits_per_byte(finished)
        word = comparison.word if comparison else "none"
        if point == verdict.reference:
            word = "best" if is_best else "baseline"
        cells = [
            point,
            f"{len(finished)}/{seeds}",
            format_estimate(estimate) if estimate else "none",
            f"{bits:.4f}" if bits is not None else "",
            format_difference(difference) if difference else "",
            format_p(comparison.holm_p).removeprefix("= ")
            if comparison and comparison.holm_p is not None
            else "",
            word,
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return columns


def _bits_per_byte(finished: Sequence[Record]) -> float | None:
    values = [run.final["bits_per_byte"] for run in finished if run.final is not None]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(finished) else None


def _without_constants(columns: Columns) -> tuple[Columns, dict[str, str]]:
    """Splits off the columns, other than the first, that say the same in every one of several rows."""
    first = next(iter(columns))
    constant = {
        name: cells[0]
        for name, cells in columns.items()
        if name != first and len(cells) > 1 and len(set(cells)) == 1
    }
    return {name: cells for name, cells in columns.items() if name not in constant}, constant


def _rows(columns: Columns) -> list[list[str]]:
    return [list(row) for row in zip(*columns.values(), strict=True)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
