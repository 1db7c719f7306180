"""The tables of a study for a paper: LaTeX with booktabs, to be read by \\input."""

import re

from experiments.reporting import tables
from experiments.reporting.tables import Columns
from mobilellm_jax.analysis.study import Study

DECIDED = ("better", "worse")  # verdicts printed in bold
_SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # else it is an argument of the \\ or \midrule before it
    "]": "{]}",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
}


def outcomes(study: Study) -> str:
    """Table of the results of all points, as in `tables.outcomes`."""
    return _file(study, tables.outcomes(study))


def comparisons(study: Study) -> str:
    """Table of all pairs, as in `tables.comparisons`; "" without pairs. What is decided is in bold."""
    found = study.verdict.comparisons
    if not found:
        return ""
    bold = {("verdict", row) for row, c in enumerate(found) if c.word in DECIDED}
    return _file(study, tables.comparisons(study), bold)


def escape(text: str) -> str:
    """Escapes one line of text; a hyphen in front of a number becomes a minus sign."""
    text = re.sub(r"(?<![\w.)-])-(?=\d)", "\N{MINUS SIGN}", " ".join(text.split()))
    return "".join(_SPECIAL.get(character, character) for character in text)


def tabular(columns: Columns, bold: set[tuple[str, int]] | frozenset[tuple[str, int]] = frozenset()) -> str:
    """Formats a table with the first column left-aligned and the others right-aligned.

    `bold` has the (header, row) of the cells in bold.
    """

    def cell(name: str, row: int) -> str:
        text = escape(columns[name][row])
        return rf"\textbf{{{text}}}" if (name, row) in bold else text

    rows = [[cell(name, row) for name in columns] for row in range(len(next(iter(columns.values()))))]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"\toprule",
            _row([escape(name) for name in columns]),
            r"\midrule",
            *map(_row, rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _file(
    study: Study, columns: Columns, bold: set[tuple[str, int]] | frozenset[tuple[str, int]] = frozenset()
) -> str:
    notes = [
        f"{study.stem}: {study.facts.question}",
        *tables.head(study)[1:],
        r"Needs \usepackage{booktabs}.",
    ]
    return "\n".join([*(f"% {' '.join(note.split())}" for note in notes), tabular(columns, bold), ""])


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"
