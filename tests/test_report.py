"""Reports from synthetic records: complete, in order, escaped, the same bytes twice; errors for people."""

import base64
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import real
from test_results import make_diverged, make_record, make_tuning

from experiments import report
from experiments.reporting import figures, gallery, index, pages
from mobilellm_jax.analysis.records import write_record
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PAIRS = [["4 x 128", "2 x 128"], ["8 x 128", "2 x 128"]]
SCORES = {2: (3.62, 3.65, 3.6), 4: (3.55, 3.57, 3.56), 8: (3.61, 3.66, 3.6)}
HEADINGS = [
    "Verdict",
    "Floor and context",
    "Designs",
    "Learning rates",
    "Outcomes",
    "Against parameters and FLOPs",
    "Against latency and bytes",
    "Training curves",
    "Runs that did not finish",
    "Cost",
    "Data",
    "Code and device",
    "To make it again",
]
EVIL = """</title><script>alert("1")</script>|<img src=x onerror='y'> [a](javascript:b) `c` *d* & e"""


def study(**changes):
    changes = {"pairs": PAIRS, **changes}
    compared = [
        make_record(depth=depth, seed=seed, score=score, **changes)
        for depth, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    return compared + [run for depth in SCORES for run in make_tuning(depth=depth, score=3.6, **changes)]


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page holds."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [] if self.open and self.open[-1] == "style" else [data]

    def values(self, name):
        return [value for key, value in self.attributes if key == name]

    @property
    def text(self):
        return "".join(self.words)


def make(records):
    """Returns the report as an HTML page and as Markdown, with empty images: to draw them takes time."""
    found = study_of(records)
    suffixes = ["", "-costs", "-pareto", "-curves", *(["-learning_rates"] if found.verdict.tuning else [])]
    images = {suffix: figures.Image(f"shape{suffix}.png", "what it shows", b"") for suffix in suffixes}
    sections = pages.contents(found, images)
    title = records[0].question
    return Page(pages.to_html(title, sections)), pages.to_markdown(title, sections)


def table(text, heading, number=0):
    """Returns the rows of a table below a heading of the Markdown report."""
    below = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = [block for block in below.strip().split("\n\n") if block.startswith("|")]
    lines = blocks[number].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}
    return [rows[0], *rows[2:]]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_and_the_text_to_print(tmp_path):
    text, _ = pages.report(study_of(study()), tmp_path)
    names = "shape-tiny.png shape-tiny-curves.png shape-tiny-learning_rates.png"  # all cost the same
    names += " shape-tiny.csv shape-tiny-comparisons.csv"
    expected = {f"figures/{name}" for name in names.split()}
    assert files(tmp_path).keys() == expected | {"reports/shape-tiny.html", "reports/shape-tiny.md"}
    assert " ".join(study_of(study()).verdict.sentence.split()) in " ".join(text.split())
    assert text.splitlines()[-1] == f"Report: {tmp_path}/reports/shape-tiny.html"
    assert max(map(len, text.splitlines()[:-1])) <= 120


def test_page_is_whole_in_one_file(tmp_path):
    pages.report(study_of(study()), tmp_path)
    page = Page((tmp_path / "reports" / "shape-tiny.html").read_text())
    assert "script" not in page.tags
    assert "link" not in page.tags
    hrefs = page.values("href")
    assert {f"#{value}" for value in page.values("id")} == {href for href in hrefs if href.startswith("#")}
    beside = [href for href in hrefs if not href.startswith("#")]
    assert beside.pop() == "index.html"
    assert all((tmp_path / "reports" / href).is_file() for href in beside)
    assert "width=device-width, initial-scale=1" in page.values("content")
    suffixes = ("", "-learning_rates", "-curves")
    names = [f"shape-tiny{suffix}.png" for suffix in suffixes]
    images = [base64.b64decode(value.removeprefix("data:image/png;base64,")) for value in page.values("src")]
    assert images == [(tmp_path / "figures" / name).read_bytes() for name in names]
    text = (tmp_path / "reports" / "shape-tiny.md").read_text()
    links = [Path(link) for link in re.findall(r"!\[.*\]\((.*)\)", text)]
    assert links == [Path("../figures") / name for name in names]
    assert page.tags.count("h1") == 1


def test_both_pages_say_the_same_in_the_same_order():
    page, text = make(study())
    assert re.findall("^## (.*)", text, re.MULTILINE) == HEADINGS
    places = [page.text.index(f"\n{heading}\n") for heading in HEADINGS]
    assert places == sorted(places)
    assert text.startswith("# Does depth or width help more?\n")
    for heading in ("Verdict", "Designs", "Learning rates", "Outcomes", "Cost", "Data"):
        for cell in (cell for row in table(text, heading) for cell in row):
            assert cell.replace("\\", "") in page.text


def test_answer_comes_first_and_the_index_has_it(tmp_path):
    found = study_of(study())
    pages.report(found, tmp_path)
    index.write(tmp_path)
    said = (
        "'4 x 128' is better than '2 x 128'; '8 x 128' is undecided (differences of 0.0633 nats per token, "
        "up to 6.5% in perplexity)."
    )
    _, first, *_ = (tmp_path / "reports/shape-tiny.md").read_text().split("\n\n")
    assert first == said
    listed = (tmp_path / "reports/index.md").read_text()
    assert (
        listed == f"# All reports\n\n- [shape-tiny](shape-tiny.md): Does depth or width help more? {said}\n"
    )
    page = Page((tmp_path / "reports/index.html").read_text())
    assert page.values("href") == ["shape-tiny.html"]
    assert said in page.text


def test_contents_lead_to_every_section():
    page, text = make(study())
    (line,) = re.findall("^Contents: (.*)", text, re.MULTILINE)
    assert re.findall(r"\[(.*?)\]", line) == HEADINGS
    assert re.findall(r"\(#(.*?)\)", line)[:2] == ["verdict", "floor-and-context"]
    assert page.values("href") == [f"#{name}" for name in page.values("id")]


def test_warnings_come_before_the_verdict():
    records = study()
    records[0] = dataclasses.replace(records[0], git_commit="fedcba9")
    page, text = make(records)
    assert text.index(f"## {pages.WARNINGS}") < text.index("git commit: fedcba9") < text.index("## Verdict")
    assert page.text.index("fedcba9") < page.text.index("Verdict")
    assert "warnings" in page.values("class")


def test_every_seed_is_shown_and_what_did_not_finish():
    records = study()
    records[0] = make_diverged(depth=2, seed=0, pairs=PAIRS)
    del records[4]
    _, text = make(records)
    assert table(text, "Outcomes", 1) == [
        ["point", "seed 0", "seed 1", "seed 2"],
        ["2 x 128", "diverged", "3.6500", "3.6000"],
        ["4 x 128", "3.5500", "no record", "3.5600"],
        ["8 x 128", "3.6100", "3.6600", "3.6000"],
    ]
    below = text.split("## Runs that did not finish\n")[1].split("\n## ")[0]
    assert "'2 x 128' seed 0, comparison, learning rate 0.002: diverged after 300 steps: loss is nan" in below
    assert below.count("seed 0, tuning, learning rate 0.008: diverged") == 3


def test_errors_are_shown_as_exact_match():
    records = [
        make_record(metric="error", depth=d, seed=s, score=0.25, pairs=PAIRS) for d in (2, 4) for s in (0, 1)
    ]
    _, text = make(records)
    assert table(text, "Outcomes", 1)[1] == ["2 x 128", "75.00", "75.00"]


def test_learning_rates_say_what_was_tried():
    rows = table(make(study())[1], "Learning rates")
    tried = ["3.7200", "3.6300", "3.6000", "3.6300", "none"]
    assert rows == [
        ["point", "chosen", "best lies", "0.0005", "0.001", "0.002", "0.004", "0.008"],
        *([f"{depth} x 128", "0.002 ≈ 2⁻⁹·⁰", "inside", *tried] for depth in SCORES),
    ]
    assert "The best rate tried of all designs is 0.002." in make(study())[1]
    (row,) = table(make(make_tuning(pairs=[])[:3])[1], "Learning rates")[1:]
    assert row[2] == "at the edge"


@pytest.mark.parametrize("tuning", ["none", "transferred", "grid"])
def test_study_without_tuning_runs_says_so(tuning):
    _, text = make([r for r in study(tuning=tuning) if r.phase == "comparison"])
    assert "## Learning rates\n\nNo learning rates were tried.\n" in text
    assert "learning_rates.png" not in text


def test_cost_is_summed_by_phase():
    records = study()
    records[0] = dataclasses.replace(records[0], timing={**records[0].timing, "wall_s": None})
    rows = table(make(records)[1], "Cost")
    # 9 runs of 2,048,000 tokens; 12 more and 3 that diverged after 300 of 500 steps
    assert rows[1] == ["tuning", "15", "0:07:30", "28.3 M", "178 T"]
    assert rows[2] == ["comparison", "9", "0:04:00 and 1 unknown", "18.4 M", "116 T"]
    assert rows[3] == ["total", "24", "0:11:30 and 1 unknown", "46.7 M", "294 T"]


def test_origins_are_complete():
    card = {
        "source_sha256": "ab" * 32,
        "tokenizer_sha256": "cd" * 32,
        "licence": "PSF-2.0",
        "splits": {"rows": 1},
    }
    records = study(data=card)
    records[0] = dataclasses.replace(records[0], git_commit=None, created="2026-01-02T00:00:00+00:00")
    _, text = make(records)
    assert table(text, "Data")[1:] == [["licence", "PSF-2.0"], *([k, v] for k, v in [*card.items()][:2])]
    origins = dict(table(text, "Code and device")[1:])
    assert origins["git commit"] == "0123abc (23 runs), unknown (1 runs)"
    assert origins["device"] == "1 x cpu (cpu)"
    assert origins["jax"] == "0.10.2"
    assert text.endswith(
        "## To make it again\n\n    python -m experiments.sweep --config=configs/shape.py:tiny\n"
    )


def test_what_records_say_cannot_become_markup():
    fields = ("question", "matched", "git_commit", "command")
    changes = {**dict.fromkeys(fields, EVIL), "data": {"source_sha256": EVIL, "tokenizer_sha256": EVIL}}
    changes |= {
        "point": EVIL,
        "pairs": [[EVIL, EVIL + "2"]],
        "device": dict.fromkeys(("platform", "kind"), EVIL),
    }
    changes["device"]["count"] = 1
    records = [make_record(versions={EVIL: EVIL}, **changes), make_diverged(seed=1, error=EVIL, **changes)]
    records += make_tuning(**changes)
    page, text = make([dataclasses.replace(r, versions={EVIL: EVIL}) for r in records])
    evil_header = Page(pages.to_html("", [("", [{EVIL: [EVIL]}])]))
    assert "script" not in page.tags + evil_header.tags
    assert page.tags.count("img") == 5
    assert not page.values("onerror")
    assert EVIL in page.text
    prose = re.sub("^    .*$", "", text, flags=re.MULTILINE)  # but for code
    assert "<script" not in re.sub(r"\\<", "", prose)
    assert not re.search(r"(?<!\\)\]\(javascript", prose)
    for heading in ("Learning rates", "Outcomes", "Data", "Code and device"):
        table(text, heading)  # checks the number of columns


def test_names_of_files_stay_in_the_folder(tmp_path):
    pages.report(study_of([make_record(study="../../a b", preset="c/d", pairs=[])]), tmp_path)
    assert (tmp_path / "reports" / "..-..-a-b-c-d.html").is_file()
    assert {path.parent for path in tmp_path.rglob("*.*")} == {tmp_path / "reports", tmp_path / "figures"}


@pytest.mark.parametrize(
    "records",
    [
        [make_record(pairs=[])],
        [make_diverged(depth=d, pairs=PAIRS[:1]) for d in (2, 4)],
        make_tuning(pairs=[]),
        [
            make_record(depth=d, status="failed", error="killed", final=None, data={}, pairs=PAIRS[:1])
            for d in (2, 4)
        ],
    ],
    ids=["one run", "all diverged", "only tuned", "all failed"],
)
def test_study_with_next_to_nothing_is_reported(tmp_path, records):
    pages.report(study_of(records), tmp_path)
    page = Page((tmp_path / "reports" / "shape-tiny.html").read_text())
    assert study_of(records).verdict.sentence in page.text
    assert page.tags.count("img") == (3 if records[0].phase == "tuning" else 2)


@pytest.mark.slow
def test_command_gives_the_same_bytes_elsewhere(tmp_path):
    records = [*study(), make_diverged(depth=2, phase="tuning", learning_rate=16e-3, pairs=PAIRS)]
    for i, record in enumerate(reversed(records)):
        write_record(record, tmp_path / "a" / "results" / record.study / f"{i}.json")
    environment = {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"}
    workdir, formats = f"--workdir={tmp_path / 'a'}", ",".join(figures.FORMATS)
    done = real("experiments.report", workdir, f"--formats={formats}", env=environment)
    assert done.returncode == 0, done.stderr
    found = study_of(records)
    text, _ = pages.report(found, tmp_path / "b", figures.FORMATS)
    index.write(tmp_path / "b")
    assert text.replace(str(tmp_path / "b"), str(tmp_path / "a")) in done.stdout
    for folder in ("figures", "reports"):
        assert files(tmp_path / "a" / folder) == files(tmp_path / "b" / folder)


def test_figures_for_a_paper(tmp_path):
    figures.save("f", "what it shows", figures.curves(study_of(study())), tmp_path, figures.FORMATS)
    files = {path.suffix: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert files.keys() == {".png", ".svg", ".pdf"}
    ElementTree.fromstring(files[".svg"])
    assert files[".pdf"].startswith(b"%PDF")
    assert b"/Type3" not in files[".pdf"]
    assert not any(b"Date" in content or b"matplotlib v" in content.lower() for content in files.values())


def test_unknown_format_is_refused():
    with pytest.raises(UserError, match="--formats: no format 'svgg'; did you mean svg"):
        report.formats_of(["png", "svgg"])


@pytest.mark.slow
def test_reports_are_made_without_jax():
    code = "import sys, experiments.report as _; print({'jax', 'matplotlib.pyplot'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_folder_without_records_says_how_to_make_them(tmp_path):
    with pytest.raises(UserError) as error:
        report.redraw(tmp_path / "nowhere")
    assert str(error.value) == (
        f"{tmp_path}/nowhere/results: no records of runs (*.json); "
        f"make some with: python -m experiments.sweep --workdir={tmp_path}/nowhere"
    )


def test_damaged_record_is_refused(tmp_path):
    write_record(make_record(), tmp_path / "results" / "good.json")
    (tmp_path / "results" / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"results/bad\.json: not a readable JSON record"):
        report.redraw(tmp_path)
    assert not (tmp_path / "reports").exists()


def test_study_that_cannot_be_compared_does_not_stop_the_others(tmp_path):
    for name, record in {
        "a": make_record(study="a", seed=0, pairs=[]),
        "b": make_record(study="a", seed=1, steps=3, pairs=[]),
        "c": make_record(study="b", pairs=[]),
    }.items():
        write_record(record, tmp_path / "results" / f"{name}.json")
    with pytest.raises(UserError, match="a:tiny: steps is 500"):
        report.redraw(tmp_path)
    assert {path.name for path in (tmp_path / "reports").glob("*.html")} == {"b-tiny.html", "index.html"}
    assert "### b, tiny" in (tmp_path / "claims.md").read_text()


def write_all(records, workdir):
    for i, record in enumerate(records):
        write_record(record, workdir / "results" / record.study / record.preset / f"{i}.json")


def test_the_command_for_most_of_a_study_comes_first():
    start = "python -m experiments.sweep"
    default, paper = f"{start} --workdir=x", f"{start} --config=configs/paper.py:tiny"
    part, whole = (
        f"{start} --config=configs/shape.py:tiny{more}" for more in (" --only=a", " --seeds=30000")
    )
    of = study_of([make_record(seed=i, command=c) for i, c in enumerate((default, paper, part, whole))])
    assert gallery.commands(of) == [whole, part, paper]
    assert gallery.commands(study_of([make_record(command=default)])) == [start]


def test_every_figure_leads_to_its_config_command_records_and_report(tmp_path):
    command = "python -m experiments.sweep --config=configs/layer_sharing.py:tiny --quantize=w8a8"
    said = [f"{command} --only=none", command]
    sharing = [
        make_record(
            study="layer_sharing",
            point=point,
            point_index=i,
            x=None,
            pairs=[["immediate", "none"]],
            command=said[i],
        )
        for i, point in enumerate(("none", "immediate"))
    ]
    write_all([make_record(pairs=[], question="First | or *last*?"), *sharing], tmp_path)
    report.redraw(tmp_path)
    text = (tmp_path / "claims.md").read_text()
    gallery = text.split("## All figures\n")[1]
    links = re.findall(r"\]\(([^)]*)\)", gallery)
    assert all((tmp_path / link).exists() for link in links), links
    shown = {Path(link).name for link in links if link.startswith("figures/")}
    assert shown == {path.name for path in (tmp_path / "figures").glob("*.png")}
    first, second = gallery.split("### ")[1:]
    assert first.startswith("layer_sharing, tiny\n")  # the paper's come first
    assert "beside ours](figures/layer_sharing-tiny-paper.png)" in first
    assert {"reports/layer_sharing-tiny.md", "results/layer_sharing/tiny"} <= set(links)
    (config,) = [link for link in links if link.endswith(".py")]
    assert (tmp_path / config).resolve() == ROOT / "configs" / "layer_sharing.py"
    assert f"`{command}` and other commands, see the report" in first
    assert "[2 records](results/layer_sharing/tiny)" in first
    assert "First | or \\*last\\*?" in second
    assert f"`{make_record().command}`" in second  # of a study whose config is not here
    report.redraw(tmp_path, ["tex"])  # its own page may be replaced
    assert (tmp_path / "claims.md").read_text() == text
    tex = {path.name for path in (tmp_path / "figures").glob("*.tex")}
    assert tex == {"shape-tiny.tex", "layer_sharing-tiny.tex", "layer_sharing-tiny-comparisons.tex"}


def test_a_page_of_someone_else_is_not_replaced(tmp_path):
    write_all([make_record(pairs=[])], tmp_path)
    (tmp_path / "claims.md").write_text("# My project")
    with pytest.raises(UserError, match=r"claims\.md: refusing to overwrite"):
        report.redraw(tmp_path)
    assert (tmp_path / "claims.md").read_text() == "# My project"
    assert not (tmp_path / "reports").exists()


def test_a_record_names_no_file_outside_the_workdir(tmp_path):
    pages.report(study_of(study(study="../../x", preset="/y")), tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
