"""The documentation: links lead somewhere, commands exist, numbers are those of records, tutorials run."""

import json
import lzma
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
from absl import flags
from commands import command

from configs import base, playground
from experiments import cli, docs
from experiments.reporting import site
from experiments.runner.score_table import percent
from mobilellm_jax.analysis.records import read_record
from mobilellm_jax.errors import UserError
from mobilellm_jax.sharing import STRATEGIES, layer_plan

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Where pages lead outside of the repository. Nothing follows these: look at a new one before adding it.
OUTSIDE = {
    "https://arxiv.org/abs/1503.02531",
    "https://arxiv.org/abs/2402.14905",
    "https://github.com/COST-ELTeC/ELTeC-eng",
    "https://github.com/ngxson/wllama",
    "https://jobset.sigs.k8s.io",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """All blocks of code: the words behind the fence, and the text."""
    found, inside = [], False
    for line, is_prose in site.prose(page.read_text(encoding="utf-8")):
        if is_prose:
            inside = False
        elif not inside:
            found.append((line.strip("` \n"), []))
            inside = True
        elif line.strip() == "```":
            inside = False
        else:
            found[-1][1].append(line)
    return [(kind, "".join(lines)) for kind, lines in found]


def anchors(page: Path) -> set[str]:
    """The places on a page that links may name, as GitHub and the site call them."""
    titles = [line for line, is_prose in site.prose(page.read_text()) if is_prose and line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title.strip("# \n").lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in site.links(page.read_text(encoding="utf-8")):
        if not site.is_relative(link):
            assert link in OUTSIDE
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_links_are_found():
    page = (
        "a [b](c.md) ![d](e.png)\n`[f](g.md)`\n```text\n[h](i.md)\n```\n[![j](k.png)](l.md#m) https://n.org\n"
    )
    assert site.links(page) == ["c.md", "e.png", "k.png", "l.md#m"]


@pytest.mark.parametrize("name", docs.made())
def test_generated_parts_are_current(name):
    """If not: python -m experiments.docs."""
    assert (ROOT / name).read_text(encoding="utf-8") == docs.made()[name]


def test_what_lies_outside_of_the_marks_is_kept():
    text = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n"
    assert site.fill(text, "x", "new\n") == "a\n<!-- begin: x -->\n\nnew\n\n<!-- end: x -->\nb\n"
    for broken in ("a", text + text, text.replace("begin", "end")):
        with pytest.raises(ValueError, match="once each"):
            site.fill(broken, "x", "new")


def test_the_picture_shows_the_plans():
    picture = (ROOT / "docs/assets/layer_plans.svg").read_text()
    drawn = re.findall(r'<rect .*?fill="(#\w+)"/><text [^>]*>(\d)</text>', picture)
    plans = [layer_plan(name, 3, 1 if name == "none" else 2) for name in STRATEGIES]
    assert [int(block) for _, block in drawn] == [block for plan in plans for block in plan]
    assert len(set(drawn)) == len({color for color, _ in drawn}) == 3  # a colour for each block


def test_gather_makes_links_those_of_a_site(tmp_path):
    root = tmp_path / "repository"
    for name, text in {
        "docs/index.md": "[a](howto/a.md#b) [code](../code.py) [folder](../experiments) `[x](y)`\n",
        "docs/howto/a.md": "[home](../index.md) ![f](../../experiments/f%201.png) [w](https://w.org)\n",
        "experiments/claims.md": "[a](../docs/howto/a.md)\n```\n[code](../code.py)\n```\n",
        "code.py": "",
        "experiments/f 1.png": "image",
        "docs/assets/site.css": "p {}",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    target = tmp_path / "site"
    pages = site.gather(root, target, "https://r.org/o/n")
    assert [str(page) for page in pages] == ["howto/a.md", "index.md", "experiments/claims.md"]
    assert (target / "index.md").read_text() == (
        "[a](howto/a.md#b) [code](https://r.org/o/n/blob/main/code.py) "
        "[folder](https://r.org/o/n/tree/main/experiments) `[x](y)`\n"
    )
    assert (target / "howto/a.md").read_text() == (
        "[home](../index.md) ![f](../experiments/f%201.png) [w](https://w.org)\n"
    )
    assert (
        target / "experiments/claims.md"
    ).read_text() == "[a](../howto/a.md)\n```\n[code](../code.py)\n```\n"
    assert (target / "experiments/f 1.png").read_text() == "image"
    assert (target / "assets/site.css").is_file()
    (root / "code.py").unlink()
    with pytest.raises(UserError, match=r"docs/index.md: the link ../code.py leads to no file"):
        site.gather(root, target, "https://r.org/o/n")


def test_the_site_has_all_pages_and_its_menu_no_other(tmp_path):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {page.as_posix() for page in site.gather(ROOT, tmp_path, settings["repo_url"])}
    shown = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert set(shown) <= pages
    assert {page for page in pages - set(shown) if not page.startswith("experiments/reports/")} == set()


# Commands.


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every `python -m experiments.<name> ...` in code, or `mobilellm <name> ...`."""
    prose = [line for line, is_prose in site.prose(page.read_text(encoding="utf-8")) if is_prose]
    code = re.findall("`([^`\n]+)`", "".join(prose))
    code += [text for kind, text in blocks(page) if kind in ("bash", "console")]
    for part in code:
        text = part.replace("\\\n", " ")
        for found in re.finditer(r"(?:python -m experiments\.|mobilellm )(\w+[^\n]*)", text):
            line = f"experiments.{found[1]}"
            line = line.rstrip("'") if line.count("'") % 2 else line  # the end of --command='...'
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;)")
            lexer.whitespace_split = True
            words = list(lexer)
            end = next((i for i, word in enumerate(words) if set(word) <= set("&|;)")), len(words))
            yield words[:end]


@pytest.fixture(scope="module")
def flags_of():
    """A function from the name of a command to its flags and default config, without running it."""
    seen: dict[str, tuple[set[str], str]] = {}

    def look(name: str) -> tuple[set[str], str]:
        if name not in seen:
            taken: list[tuple[set[str], str]] = []

            def note(main, default_config="", define_flags=lambda: None):
                before = set(flags.FLAGS)
                define_flags()
                own = set(flags.FLAGS) - before
                taken.append((own, default_config))
                for flag in own:
                    delattr(flags.FLAGS, flag)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cli, "run", note)
                patch.delitem(sys.modules, name, raising=False)
                runpy.run_module(name, run_name="__main__")
            seen[name] = taken[0]
        return seen[name]

    return look


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist_and_take_these_flags(page, flags_of, monkeypatch):
    monkeypatch.chdir(ROOT)
    for module, *arguments in command_lines(page):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        known, default = flags_of(module)
        given = dict(word.removeprefix("--").partition("=")[::2] for word in arguments if word != "...")
        spec = given.pop("config", default)
        if not Path(spec.partition(":")[0]).is_file():  # a study of a tutorial
            assert spec in {kind.partition('"')[2][:-1] for page in TUTORIALS for kind, _ in blocks(page)}
            spec = "configs/base.py"
        if spec.startswith("configs/finetune.py:"):  # a run of the reader
            spec = "configs/base.py"
        config = cli.load_config(spec)[2] if default else None
        for flag in given:
            if flag.startswith("config."):
                assert config is not None
                cli.check_field(config, flag.removeprefix("config."))
            else:
                assert flag in {*known, "-h"}, (module, flag)


def test_every_command_is_mentioned_and_mapped():
    """On some page, and in the map of experiments/."""
    commands = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")} - {"cli"}
    mentioned = {words[0].partition(".")[2] for page in PAGES for words in command_lines(page)}
    assert commands <= mentioned
    assert not {name for name in commands if f"`{name}`" not in (ROOT / "experiments/README.md").read_text()}


# The README.

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert "python -m pip install -e '.[test]' && python -m pytest\n" in README  # .ci/run does the same


def test_findings_are_those_of_the_reports():
    """Differences are rounded ones of the pairs of the report that a finding leads to; the rest is there."""
    findings = README.partition("\n## Findings")[2].partition("\n## ")[0]
    checked = 0
    for finding in re.findall(r"^- (.*)", findings, re.MULTILINE):
        (link,) = [link for link in site.links(finding) if link.endswith(".md")]
        report = (ROOT / link).read_text()
        head = "| pair |" if "| pair |" in report else "| comparison |"  # of one study, of all abilities
        pairs = report.partition(head)[2].partition("\n\n")[0]
        numbers = re.findall(r" ([-+]?\d[\d.]*)(?: of the distance)? \[", pairs)
        differences = [abs(float(number)) for number in numbers]
        without_intervals = re.sub(r"[-+\d.]+ \[[^\]]*\d\]", "", finding)  # those are checked below
        for said in re.findall(r"\b0\.\d+|\d+(?= points)", without_intervals):
            places = len(said.partition(".")[2])
            known = {f"{difference:.{places}f}" for difference in differences}
            assert said in known or re.search(rf"\b{re.escape(said)}\b", report), (finding, said)
            checked += 1
        for said in re.findall(r"[-+\d.]+(?: %)? \[[^\]]*\d\]|[-\d]+ to [-\d]+ %", finding):
            assert said in report, (finding, said)
            checked += 1
        for size in re.findall(r"[\d.]+ [kM]\b", finding):
            assert re.search(rf"(?<![\d.]){re.escape(size)}\b", report), (finding, size)
            checked += 1
    assert checked >= 20


def test_no_claim_is_judged_yet():
    """As the README says, where architecture can be judged (no star); once one is, say which."""
    table = (ROOT / "experiments/claims.md").read_text().partition("| claim |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split(" | ")] for row in table.splitlines()[2:]]
    agree, disagree = ([row[0] for row in rows if row[column]] for column in (1, 2))
    assert all(row[1].endswith("\\*") for row in rows if row[1])
    assert all(row[2].endswith("\\*") for row in rows if row[2])
    assert [len(agree), len(disagree)] == [2, 3]
    assert len(rows) == 12
    assert "of the paper our records agree with two and disagree with three; of seven they" in README
    for text in ("roadmap", "A quarter of the key/value heads"):
        assert any(text in claim for claim in agree)
    for text in ("Tying the embeddings", "32 and 8 heads", "A teacher does not help"):
        assert any(text in claim for claim in disagree)


@pytest.mark.slow
def test_the_first_command_ends_as_printed(tmp_path):
    """It finds all of its runs in the committed records, so it trains nothing."""
    for study in playground.studies("tiny"):
        folder = Path("results", "playground", study.partition(":")[2])
        shutil.copytree(ROOT / "experiments" / folder, tmp_path / folder)
    result = command("experiments.sweep", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    for page in (ROOT / "README.md", ROOT / "docs/start.md"):
        for kind, text in blocks(page):
            if kind == "text":
                assert [line for line in text.splitlines() if line not in printed] == []


@pytest.mark.slow
def test_the_python_api_trains_as_written(tmp_path):
    """In a folder of one's own: the loss that it prints is below that of a guess."""
    [text] = [text for kind, text in blocks(ROOT / "docs/reference/api.md") if kind == "python"]
    line = [sys.executable, "-c", text]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.splitlines()[-1]) < math.log(base.get_config().model.vocab_size)


# Tutorials.

# Steps and rows so few that a run takes seconds; the last flag of a name counts.
SHORT = """#!/bin/sh
case "$*" in
*--list*) ;;
"-m experiments.sweep"*) set -- "$@" --seeds=2 FIELDS ;;
"-m experiments.profile"*) set -- "$@" --seeds=2 --against=none ;;
"-m experiments.train"*) set -- "$@" FIELDS ;;
esac
exec PYTHON "$@"
"""
FIELDS = {
    "train.steps": 6,
    "train.eval_every": 3,
    "train.eval_rows": 64,
    "train.log_every": 3,
    "optimizer.warmup_steps": 2,
}


def masked(line: str) -> str:
    """A line without its numbers, as two runs of a command should agree in."""
    return re.sub(r"[-+]?[\d.,:]*\d", "#", " ".join(line.split()))


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_tutorials_run(page, tmp_path):
    """In a copy of the project; what is printed there is printed here too, but for the numbers."""
    data = ["results", "figures", "reports", "bench", "runs"]  # of experiments; the library has a room `runs`
    for folder in ("mobilellm_jax", "configs", "experiments"):
        left_out = shutil.ignore_patterns("__pycache__", *(data if folder == "experiments" else ()))
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    playground = tmp_path / "configs/playground.py"  # a tenth of the steps, so that no record is comparable
    cut = re.sub(r"(steps|exposures)=(\d+)0,", r"\1=\2,", playground.read_text())
    assert cut != playground.read_text()
    playground.write_text(cut)
    fields = " ".join(f"--config.{name}={value}" for name, value in FIELDS.items())
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(SHORT.replace("FIELDS", fields).replace("PYTHON", sys.executable))
    python.chmod(0o755)
    texts = [json.dumps({"text": text}) for text in topics.values()]  # in place of a reader's own
    (tmp_path / "novels_train.jsonl.xz").write_bytes(lzma.compress("\n".join(texts).encode()))
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
    environment = {
        name: value for name, value in environment.items() if name not in ("PYTHONPATH", "XLA_FLAGS")
    }
    printed: set[str] = set()
    for kind, text in blocks(page):
        if named := re.fullmatch(r'python title="([\w.]+)"', kind):
            (tmp_path / named[1]).write_text(text)
        elif kind == "diff":
            subprocess.run(["patch", "-p1"], input=text, cwd=tmp_path, text=True, check=True)
        elif kind == "bash":
            line = ["bash", "-ec", text]
            done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            printed |= {masked(line) for line in (done.stdout + done.stderr).splitlines()}
        elif kind == "text":
            assert any(masked(line) in printed for line in text.splitlines() if line.strip()), text
        else:
            assert kind == "console", kind


def test_the_numbers_of_the_walk_are_those_of_its_records():
    lines = (ROOT / "docs/tutorials/phone.md").read_text().splitlines()
    text, calls = (read_record(ROOT / f"experiments/phone/{name}.json") for name in ("text", "phone"))
    for record in (text, calls):
        bits = record.final["bits_per_byte"]
        said = f"finished: held-out loss {record.loss:.4f} nats per token, {bits:.4f} bits per byte"
        assert any(line.startswith(said) for line in lines), said
    minutes = -(-(text.timing["wall_s"] + calls.timing["wall_s"]) // 60)
    assert f"less than {minutes:.0f} minute" in " ".join(lines)
    assert calls.parent["run"] == "text"
    assert {*calls.calls} == {"combinations", "values", "wordings"}
    for name, entry in calls.calls.items():
        (line,) = [line for line in lines if line.startswith(f"{name} (")]
        shown = [percent(of["value"], of["standard_error"]) for of in entry["metrics"].values()]
        assert [said for said in shown if said not in line] == []
    assert {*calls.quantized} == {"w8a8", "w4:32"}
    for name, entry in calls.quantized.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert f"{entry['loss']:.5f} {entry['gap']:>+9.5f}" in line


def test_the_idea_takes_fifteen_lines():
    (code,) = [text for kind, text in blocks(ROOT / "docs/tutorials/own_idea.md") if "title" in kind]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
