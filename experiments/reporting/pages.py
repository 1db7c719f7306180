"""The report of a study: one structure, written as HTML and as Markdown."""

import base64
import dataclasses
import datetime
import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import quote

from experiments.reporting import (
    beside_paper,
    evidence,
    figures,
    gallery,
    layers,
    loops,
    numerals,
    pareto,
    quantized,
    replies,
    sample_texts,
    step_times,
    tables,
    titles,
)
from experiments.reporting.figures import Image
from mobilellm_jax.analysis.answer import in_words, reading
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, budget_name
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.tuning import Tuning
from mobilellm_jax.storage.files import AnyPath, path_of, write_atomically


@dataclasses.dataclass(frozen=True)
class Code:
    """Preformatted lines."""

    lines: list[str]


@dataclasses.dataclass(frozen=True)
class Links:
    """Bullet points with links: text, address relative to reports/, and what follows.

    An address of a report ends with .md; the HTML page leads to its .html instead.
    """

    items: list[tuple[str, str, str]]


Block = str | list[str] | tables.Columns | Image | Code | Links  # paragraph, bullet points, table, ...
# Heading, content; sections without content are omitted. Without a heading: the lead, below the title.
Section = tuple[str, Sequence[Block]]

# Light or dark by the reader's preference. The content policy forbids loading or running anything.
_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 60rem; margin: auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
       overflow-wrap: break-word }}
.wide, pre {{ overflow-x: auto; margin: 1rem 0 }}
img {{ display: block; width: 100%; max-width: 36rem; background: white }}
@media (prefers-color-scheme: dark) {{ img {{ filter: invert(1) hue-rotate(180deg) brightness(1.4) }} }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid #8888; text-align: left; vertical-align: top;
         white-space: nowrap }}
th {{ vertical-align: bottom; white-space: normal }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: Canvas; white-space: normal;
                                min-width: 7rem; max-width: 40vw }}
.number {{ text-align: right }}
.long {{ min-width: 16rem; white-space: normal; overflow-wrap: anywhere }}
.lead {{ font-size: 1.1rem }}
.warnings {{ border-left: 0.3rem solid #d55e00; padding-left: 0.8rem }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
INDEX = "index"
_LONG = 44  # characters of a cell that is broken into lines
WARNINGS = "Read this first"
BUDGETS = (
    "A star marks the budget held equal. D/L is the width over the layers applied; outside: of the 6 to 320 "
    "that the paper's models at 125M have."
)
SHARES = (
    "acc / acc_norm in percent, mean over the seeds; in brackets the number of questions. Chance is the "
    "expected share of a guess, majority that of the place that is right most often."
)


def report(
    study: Study, workdir: str | AnyPath, formats: Collection[str] = figures.FORMATS[:1]
) -> tuple[str, dict[str, Image]]:
    """Writes figures, tables (CSV) and report (HTML, Markdown) of one study at one preset.

    `formats` are those of `figures.FORMATS` to write.

    Returns:
      The text to print: warnings, tables, verdict, and the path of the report. And the figures by suffix.

    Raises:
      UserError: a file cannot be written.
    """
    found, standing = study.verdict, pareto.pareto_of(study, workdir)
    images = figures.write(study, standing, workdir, formats)
    sections = contents(study, images, pareto.block(study, standing))
    files = "Files", [_files(study, images, path_of(workdir))]
    path = write_page(study.stem, study.facts.question, [*sections, files], workdir)
    said = textwrap.fill(found.sentence, 110, break_long_words=False, break_on_hyphens=False)
    short = textwrap.fill(in_words(study), 110, break_long_words=False, break_on_hyphens=False)
    warnings = [f"Warning: {warning}" for warning in found.warnings]
    lines = [*warnings, tables.text(study), "", said, "", short, f"Report: {path}.html"]
    return "\n".join(lines), images


def _files(study: Study, images: dict[str, Image], workdir: AnyPath) -> Links:
    """The tables behind the figures, the records and the index, as far as they are there."""
    named = {"": "points", "-comparisons": "pairs", "-paper": "paper's points"}
    items = [
        (f"Table of the {name} (CSV)", f"../figures/{quote(study.stem + suffix)}.csv", "")
        for suffix, name in named.items()
        if (workdir / "figures" / f"{study.stem}{suffix}.csv").exists()
    ]
    facts = study.facts
    if (workdir / (folder := f"results/{facts.study}/{facts.preset}".rstrip("/"))).is_dir():
        items.append((f"{len(study.runs)} records", f"../{quote(folder)}", ""))
    return Links([*items, ("All reports", f"{INDEX}.md", "")])


def write_page(name: str, title: str, sections: Sequence[Section], workdir: str | AnyPath) -> AnyPath:
    """Writes reports/<name>.html and .md, and returns their path without the suffix."""
    path = path_of(workdir) / "reports" / name
    for suffix, page in ((".html", to_html), (".md", to_markdown)):
        write_atomically(f"{path}{suffix}", page(title, sections).encode())
    return path


def contents(study: Study, images: dict[str, Image], standing: Sequence[Block] = ()) -> list[Section]:
    """Sections of the report: the answer and warnings first, then the verdict, then the evidence.

    `standing` is what is said of latency and bytes.
    """
    found, runs = study.verdict, study.runs
    pairs = [tables.comparisons(study)] if found.comparisons else []
    pairs += [over_arms] if (over_arms := tables.joint(study)) else []
    paper = beside_paper.table(study)
    regime = [columns for columns in (evidence.floors(study), evidence.positions(study)) if columns]
    texts, paired = evidence.documents(study), evidence.paired_questions(study)

    def shown(suffix: str) -> list[Block]:
        return [images[suffix]] if suffix in images else []

    claimed = [f"The paper claims: {text}. Our records: {word}." for text, word in beside_paper.judged(study)]
    lead = filter(None, [in_words(study), reading(study), claimed])
    return [
        ("", list(lead)),
        (WARNINGS, [found.warnings] if found.warnings else []),
        ("Verdict", [found.sentence, images[""], *pairs]),
        ("Floor and context", [evidence.FLOORS, *regime] if regime else []),
        ("Other held-out documents", [evidence.TEXTS, texts] if texts else []),
        ("Beside the paper", [*shown("-paper"), paper] if paper else [*(replies.beside_paper(study) or ())]),
        ("Designs", [*tables.head(study)[1:], *tables.designs(study, budget_name), BUDGETS]),
        ("Learning rates", [*shown("-learning_rates"), *_learning_rates(found.tuning)]),
        ("Outcomes", [MEASURES[study.facts.metric].caption, tables.outcomes(study), _seeds(study)]),
        ("By level", [evidence.LEVELS, levels] if (levels := evidence.levels(study)) else []),
        ("Use of the layers", [*shown("-layers"), layers.USE, use] if (use := layers.table(study)) else []),
        ("Other numbers of loops", [*shown("-loops"), loops.LOOPS, by] if (by := loops.table(study)) else []),
        ("API calls", [replies.CALLS, calls] if (calls := replies.calls(study)) else []),
        ("Instructions", [replies.RULES, rules] if (rules := replies.rules(study)) else []),
        ("Bits per parameter", [evidence.BITS, bits] if (bits := evidence.bits(study)) else []),
        ("Quantization", _quantization(study)),
        ("Zero-shot accuracy", [SHARES, zero_shot] if (zero_shot := tables.zero_shot(study)) else []),
        ("Zero-shot, question by question", [evidence.PAIRED, paired] if paired else []),
        ("Against parameters and FLOPs", shown("-costs")),
        ("Against latency and bytes", [*shown("-pareto"), *standing]),
        ("Training curves", [images["-curves"]]),
        ("What they write", [sample_texts.SAMPLES, said] if (said := sample_texts.table(study)) else []),
        ("Runs that did not finish", _unfinished(study)),
        ("Time of a step", [step_times.TIMES, times] if (times := step_times.table(study)) else []),
        ("Cost", [_cost(runs)]),
        ("Data", [_data(runs)]),
        ("Code and device", [_origins(study)]),
        ("To make it again", [Code(gallery.commands(study))]),
    ]


def _learning_rates(searches: Mapping[str, Tuning]) -> list[Block]:
    """The final loss at every rate tried, a column for each rate."""
    if not searches:
        return ["No learning rates were tried."]
    columns: tables.Columns = {"point": list(searches), "chosen": [], "best lies": []}
    for tuning in searches.values():
        columns["chosen"].append("none" if math.isnan(tuning.chosen) else numerals.near_rate(tuning.chosen))
        columns["best lies"].append("at the edge" if tuning.at_edge else "inside")
    for rate in sorted({rate for tuning in searches.values() for rate, _ in tuning.curve}):
        values = [dict(tuning.curve).get(rate, math.nan) for tuning in searches.values()]
        columns[numerals.rate(rate)] = [
            "none" if value is None else "" if math.isnan(value) else f"{value:.4f}" for value in values
        ]
    if not any(tuning.best for tuning in searches.values()):
        return [columns]
    return [f"{titles.best_rates(searches)}. Final losses by learning rate:", columns]


def _quantization(study: Study) -> list[Block]:
    costs, pairs = quantized.costs(study), quantized.pairs(study)
    return [*([quantized.GAPS, costs] if costs else []), *([quantized.PAIRS, pairs] if pairs else [])]


def _seeds(study: Study) -> tables.Columns:
    """One row for each point, one column for each seed."""
    points = {label: point.comparison for label, point in study.points.items()}
    columns: tables.Columns = {"point": list(points)}
    for seed in sorted({run.seed for runs in points.values() for run in runs}):
        found = [[run for run in runs if run.seed == seed] for runs in points.values()]
        columns[f"seed {seed}"] = [_outcome(runs[0]) if runs else "no record" for runs in found]
    return columns


def _outcome(run: Record) -> str:
    if run.status != "finished":
        return run.status
    return f"{MEASURES[run.metric].shown(run.score):.{MEASURES[run.metric].digits}f}"


def _unfinished(study: Study) -> list[Block]:
    rows = [
        f"{run.name}, {run.phase}, learning rate {run.learning_rate:.4g}: "
        f"{run.status} after {run.steps:,} steps: {run.error or 'no message'}"
        for point in study.points.values()
        for run in point.runs
        if run.status != "finished"
    ]
    return [study.verdict.failures or "All runs finished.", *([rows] if rows else [])]


def _cost(runs: Sequence[Record]) -> tables.Columns:
    phases = {phase: [run for run in runs if run.phase == phase] for phase in ("tuning", "comparison")}
    columns: tables.Columns = {
        "phase": [],
        "runs": [],
        "time (h:mm:ss)": [],
        "tokens": [],
        "training FLOPs": [],
    }
    for name, of_phase in {**phases, "total": runs}.items():
        times = [run.timing["wall_s"] for run in of_phase]
        seconds = round(sum(time for time in times if time is not None))
        unknown = times.count(None)
        cells = [
            name,
            str(len(of_phase)),
            str(datetime.timedelta(seconds=seconds)) + (f" and {unknown} unknown" if unknown else ""),
            tables.quantity(sum(run.tokens_seen for run in of_phase)),
            tables.quantity(sum(run.tokens_seen * run.train_flops_per_token for run in of_phase)),
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return columns


def _data(runs: Sequence[Record]) -> tables.Columns:
    """All scalar fields of the data cards: source, hashes, licence and others."""
    cards = [run.data for run in runs if run.data]
    facts = sorted(
        {(k, str(v)) for card in cards for k, v in card.items() if isinstance(v, str | int | float)}
    )
    return {"data card": [name for name, _ in facts], "": [value for _, value in facts]}


def _origins(study: Study) -> tables.Columns:
    """Code, libraries, devices and dates of the runs; where these differ, with the number of runs."""
    runs, study_name = study.runs, f"{study.facts.study}, preset {study.facts.preset or 'none'}"
    dates = [run.created for run in runs]
    facts = {
        "study": Counter([study_name]),
        "runs ended": Counter([f"{min(dates)} to {max(dates)}"]),
        "git commit": Counter(run.git_commit or "unknown" for run in runs),
        "device": Counter(run.device_name for run in runs),
    }
    for name in sorted({name for run in runs for name in run.versions}):
        facts[name] = Counter(run.versions.get(name, "unknown") for run in runs)
    columns: tables.Columns = {"what": [], "which": []}
    for name, counts in facts.items():
        several = [f"{value} ({count} runs)" for value, count in sorted(counts.items())]
        columns["what"].append(name)
        columns["which"].append(", ".join(several if len(counts) > 1 else counts))
    return columns


def to_html(title: str, sections: Sequence[Section]) -> str:
    """Writes the report as one self-contained HTML page; all text from records is escaped."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    listed = [heading for heading, blocks in sections if blocks and heading not in ("", WARNINGS)]
    for heading, blocks in sections:
        if blocks:
            if len(listed) > 1 and heading == listed[0]:
                links = [f'<a href="#{slug(name)}">{html.escape(name)}</a>' for name in listed]
                body.append(f"<nav>Contents: {' · '.join(links)}</nav>")
            look = {WARNINGS: ' class="warnings"', "": ' class="lead"'}.get(heading, "")
            head = [f'<h2 id="{slug(heading)}">{html.escape(heading)}</h2>'] if heading else []
            body += [f"<section{look}>", *head, *map(_html, blocks), "</section>"]
    return _HTML.format(title=html.escape(title), body="\n".join(body))


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the documentation site make it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()))


def _html(block: Block) -> str:
    match block:
        case str():
            return f"<p>{html.escape(block)}</p>"
        case list():
            return "<ul>\n" + "".join(f"<li>{html.escape(item)}</li>\n" for item in block) + "</ul>"
        case Code(lines):
            return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"
        case Image(_, alt, png):
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            return f'<img src="{source}" alt="{html.escape(alt)}">'
        case Links(items):
            shown = [
                f'<li><a href="{html.escape(re.sub(r"[.]md$", ".html", to))}">{html.escape(text)}</a>'
                f"{html.escape(rest)}</li>\n"
                for text, to, rest in items
            ]
            return f"<ul>\n{''.join(shown)}</ul>"
        case _:
            looks = [_look(cells, is_first=not place) for place, cells in enumerate(block.values())]
            cells = [
                f"<tr>{''.join(map(_cell, looks, row))}</tr>" for row in zip(*block.values(), strict=True)
            ]
            head = "".join(
                f"<th{look}>{html.escape(name)}</th>" for look, name in zip(looks, block, strict=True)
            )
            return "\n".join(['<div class="wide"><table>', f"<tr>{head}</tr>", *cells, "</table></div>"])


def _look(cells: Sequence[str], is_first: bool) -> str:
    """Numbers are right-aligned, but for the first column; text that is long is broken into lines."""
    if not is_first and numerals.are_numbers(cells):
        return ' class="number"'
    return ' class="long"' if max(map(len, cells), default=0) > _LONG else ""


def _cell(look: str, text: str) -> str:
    return f"<td{look}>{html.escape(text)}</td>"


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """Writes the report as Markdown, with links to the figures; markup in records is escaped."""
    parts = [f"# {tables.plain(title)}"]
    listed = [heading for heading, blocks in sections if blocks and heading not in ("", WARNINGS)]
    for heading, blocks in sections:
        if blocks:
            if len(listed) > 1 and heading == listed[0]:
                links = [f"[{tables.plain(name)}](#{slug(name)})" for name in listed]
                parts.append(f"Contents: {' · '.join(links)}")
            parts += [*([f"## {heading}"] if heading else []), *map(_markdown, blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case str():
            return tables.plain(block)
        case list():
            return "\n".join(f"- {tables.plain(item)}" for item in block)
        case Code(lines):
            return "\n".join(f"    {' '.join(line.split())}" for line in lines)
        case Image(name, alt, _):
            return f"![{tables.plain(alt)}](../figures/{name})"
        case Links(items):
            return "\n".join(
                f"- [{tables.plain(text)}]({to}){tables.plain(rest)}" for text, to, rest in items
            )
        case _:
            return tables.markdown_table(
                {tables.plain(k): [tables.plain(c) for c in cells] for k, cells in block.items()}
            )
