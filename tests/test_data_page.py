"""The script of the page on the text of the studies: run as it stands, on a small folder of novels."""

import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import shape_laws

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TEI = """<TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><p>licence</p></teiHeader><text>
<front><p>title page</p></front>
<body><div><head>I.  The
  Café</head><p>A <hi>first</hi> paragraph of {name}.</p><p> </p><note>a</note></div>
<div><l>A verse</l></div></body><back><p>advertisements</p></back></text></TEI>"""


def novels(name: str) -> list[str]:
    (block,) = re.findall(f'^{name} = """(.*?)"""', SCRIPT, re.MULTILINE | re.DOTALL)
    return block.split()


TRAIN, HELD_OUT = novels("TRAIN"), novels("HELD_OUT")


def run(folder: Path, *left_out: str) -> subprocess.CompletedProcess[str]:
    """Runs the script beside a clone with all novels but `left_out`, and with some that are not used."""
    level = folder / "ELTeC-eng/level1"
    level.mkdir(parents=True)
    for name in {*TRAIN, *HELD_OUT, "ENG18991_Nobody"} - {*left_out}:
        (level / f"{name}.xml").write_text(TEI.format(name=name), encoding="utf-8")
    command = [sys.executable, "-I", "-c", SCRIPT]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_script_writes_the_files_that_the_study_reads(tmp_path):
    assert run(tmp_path).returncode == 0
    read = re.findall(r"files:(\S+)", shape_laws.__doc__)
    assert sorted(read) == sorted(path.name for path in tmp_path.glob("novels*"))
    for file, names in zip(read, (TRAIN, HELD_OUT), strict=True):
        with lzma.open(tmp_path / file, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        assert [novel["id"] for novel in found] == names
        assert found[0]["text"] == f"I. The Café\n\nA first paragraph of {names[0]}.\n\nA verse"


def test_the_lists_are_as_long_as_the_page_says_and_share_no_author():
    said = re.search(r"(\d+) novels are trained on \(.*?\), (\d+) by other authors are held out", PAGE)
    assert said is not None
    assert (len(set(TRAIN)), len(set(HELD_OUT))) == tuple(map(int, said.groups()))
    authors = [{name.partition("_")[2] for name in names} for names in (TRAIN, HELD_OUT)]
    assert authors[0].isdisjoint(authors[1])


@pytest.mark.parametrize("name", [TRAIN[3], HELD_OUT[-1]])
def test_a_novel_that_is_not_there_stops_it_and_is_named(tmp_path, name):
    done = run(tmp_path, name)
    assert done.returncode == 1
    assert re.search(f"No such file.*{name}", done.stderr)
