"""Tables as LaTeX: what a reader of LaTeX sees is what the terminal shows."""

import re

import pytest
from test_results import make_record

from experiments.reporting import latex, tables
from mobilellm_jax.analysis.study import study_of

EVIL = r"""50% of $x_1$ & {a} #2 ~b^c \d <e> |f| "g" [h] """
SEEN = {
    "textbackslash": "\\",
    "textasciitilde": "~",
    "textasciicircum": "^",
    "textless": "<",
    "textgreater": ">",
    "textbar": "|",
    "textquotedbl": '"',
}


def seen(source):
    """The characters that LaTeX prints for the contents of a cell; every special one has to be escaped."""
    token = re.compile(
        r"\\(?P<mark>[&%$#_{}])|\\(?P<name>[a-z]+)\{\}|\{(?P<bracket>[][])\}|\$(?P<math>-|\\pm|\\times)\$"
        r"|(?P<plain>[^\\&%$#_{}~^<>|\"\[\]])"
    )
    text, at = "", 0
    while at < len(source):
        found = token.match(source, at)
        assert found, source[at:]
        text += found["mark"] or found["bracket"] or found["plain"] or ""
        text += SEEN[found["name"]] if found["name"] else ""
        text += {"-": "-", r"\pm": "±", r"\times": "\N{MULTIPLICATION SIGN}", None: ""}[found["math"]]
        at = found.end()
    return text


def read(source):
    """Columns of a tabular, and the cells in bold."""
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    assert lines[0].startswith(r"\begin{tabular}{l")
    assert [lines[i] for i in (1, 3, -2, -1)] == [r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]
    rows, bold = [], []
    for line in [lines[2], *lines[4:-2]]:
        assert line.endswith(r" \\")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r" \\"))]
        strong = [re.fullmatch(r"\\textbf\{(.*)\}", cell) for cell in cells]
        bold += [seen(found[1]) for found in strong if found]
        rows.append([seen(found[1] if found else cell) for cell, found in zip(cells, strong, strict=True)])
    assert len(lines[0]) == len(r"\begin{tabular}{") + len(rows[0]) + 1
    return {name: list(cells) for name, *cells in zip(*rows, strict=True)}, bold


def a_study(**changes):
    scores = {2: (3.62, 3.65, 3.6), 4: (3.30, 3.31, 3.29), 8: (3.61, 3.66, 3.6)}
    pairs = [["4 x 128", "2 x 128"], ["8 x 128", "2 x 128"]]
    return study_of(
        [
            make_record(depth=depth, seed=seed, score=score, pairs=pairs, **changes)
            for depth, of in scores.items()
            for seed, score in enumerate(of)
        ]
    )


@pytest.mark.parametrize("columns", [{"a": ["b"]}, {"a": [EVIL, "-1.5"], EVIL: ["-2 [-0.1, +3]", "4 ± 5"]}])
def test_a_table_reads_as_it_was(columns):
    said, bold = read(latex.tabular(columns))
    names = {" ".join(name.split()): [" ".join(cell.split()) for cell in of] for name, of in columns.items()}
    assert said == names
    assert not bold


def test_negative_numbers_have_a_minus_sign():
    assert latex.escape("-0.5 [-1, 2] 1e-5 8-4 a-b") == "$-$0.5 {[}$-$1, 2{]} 1e-5 8-4 a-b"


def test_tables_of_a_study():
    study = a_study()
    assert read(latex.outcomes(study)) == (tables.outcomes(study), [])
    said, bold = read(latex.comparisons(study))
    assert said == tables.comparisons(study)
    assert bold == ["better"]
    assert [c.word for c in study.verdict.comparisons] == ["better", "cannot tell"]


def test_a_question_of_several_lines_stays_a_comment():
    source = latex.outcomes(a_study(question="One?\n\\input{two}"))
    assert next(line for line in source.splitlines() if r"\input" in line).startswith("%")
    assert latex.comparisons(study_of([make_record(pairs=[])])) == ""
