"""File names of labels and leases: unique, short, and as they always were for labels that have records."""

import json
from pathlib import Path
from urllib.parse import unquote

from experiments.runner import names

ROOT = Path(__file__).parents[1]
PLANS = [" ".join(map(str, (*range(99), last))) for last in (98, 99)]  # 290 bytes, equal but for the last


def test_committed_records_keep_their_names():
    folders = {path.parent for path in (ROOT / "experiments/results").rglob("*.json")}
    assert folders
    for folder in folders:
        points = {path.name: json.loads(path.read_text())["point"] for path in folder.glob("*.json")}
        labels = sorted(set(points.values()))
        name_of = dict(zip(labels, names.of_labels(labels), strict=True))
        assert all(file.startswith((f"{name_of[p]}-s", f"{name_of[p]}-lr")) for file, p in points.items())


def test_ordinary_labels_are_names_but_for_their_spaces_and_signs():
    assert names.of_labels(["4 x 48", "0 1 2 1", "+ SwiGLU", "tied, 1 more block", "A_b-1.5B"]) == [
        "4-x-48",
        "0-1-2-1",
        "-SwiGLU",
        "tied-1-more-block",
        "A_b-1.5B",
    ]


def test_labels_that_differ_in_signs_alone_have_names_of_their_own():
    labels = ["A+", "A*", "é", "ß", "a b", "a-b", "A", *PLANS]
    found = names.of_labels(labels)
    assert len(set(found)) == len(labels)
    assert found == names.of_labels(labels[::-1])[::-1]
    assert found[labels.index("A")] == "A"
    assert not set("".join(found)) - set("ABabx0123456789cdef.-~")
    assert all(len(name) < 120 for name in found)


def test_escaped_names_are_one_file_each_and_can_be_read_back():
    texts = ["my~study/tiny/p", "my/study/tiny/p", "my%7Estudy/tiny/p", "my study/a@b/p", "студия/tiny/p"]
    found = [names.escaped(text) for text in texts]
    assert len(set(found)) == len(texts)
    assert [unquote(name) for name in found] == texts
    assert not any("/" in name or "@" in name for name in found)
    long = [names.escaped(f"{'я' * 100}/tiny/{plan}") for plan in PLANS]
    assert len(set(long)) == 2
    assert all(len(name) < 120 for name in long)
