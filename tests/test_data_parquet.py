"""Parquet files and data sets of the hub: read as jsonl with the same rows is, and refused as clearly."""

import json
import sys

import pytest

from mobilellm_jax.data import hub
from mobilellm_jax.data.sources import open_source
from mobilellm_jax.errors import UserError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = ["one", "zwei\r\nGrüße", "", *(f"row {i}" * (i % 7) for i in range(600))]


def write(path, row_group_size=100, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path, row_group_size=row_group_size)
    return path


def read(spec, text_field="text"):
    return list(open_source(spec, text_field).read(lambda count: None))


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_reads_what_jsonl_has(tmp_path, kind):
    path = write(tmp_path / "a.parquet", id=range(len(TEXTS)), body=arrow.array(TEXTS, kind))
    rows = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(TEXTS))
    (tmp_path / "a.jsonl").write_text(rows)
    source, counts = open_source(f"files:{path}", "body"), []
    assert list(source.read(counts.append)) == read(f"files:{tmp_path}/a.jsonl", "body") == TEXTS
    assert sum(counts) == source.size == path.stat().st_size
    assert len(counts) > 2
    assert not source.is_one_text


def test_several_files_are_one_source(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.parquet", text=[name])
    (tmp_path / "c.txt").write_text("c")
    assert read(f"files:{tmp_path}/*") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "body": ["x"]}, r"no column 'text' \(data.text_field\); the columns are id .*, body \("),
        ({"text": [1, 2]}, r"the column 'text' .* has no text; the columns are text \(int64\)"),
        ({"text": ["x", None]}, "row 2: 'text' is of type NoneType; expected a string"),
        ({"text": arrow.array([], "string")}, "the file has no rows"),
    ],
)
def test_bad_columns(tmp_path, columns, message):
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(UserError, match=rf"a\.parquet[:,] {message}") as error:
        read(f"files:{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 0.5, -1])
def test_damaged_file(tmp_path, kept):
    path = write(tmp_path / "a.parquet", text=TEXTS)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept] or b"x")
    with pytest.raises(UserError, match=r"a\.parquet: truncated or not a valid \.parquet file"):
        read(f"files:{path}")


def test_damage_within_a_file(tmp_path):
    path = write(tmp_path / "a.parquet", text=TEXTS)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: "):
        read(f"files:{path}")


def test_missing_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Parquet needs pyarrow: python -m pip install -e '\.\[parquet\]'"):
        open_source(f"files:{path}", "text")


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A data set of the hub as its library would keep it; gives what was asked for."""
    import huggingface_hub

    asked = []
    for name in ("train-0", "train-1", "test-0"):
        write(tmp_path / "data" / f"{name}.parquet", text=[name])
    (tmp_path / "README.md").write_text("about")

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.download.cache_clear()
    yield asked
    hub.download.cache_clear()


def test_hub_reads_the_training_files_of_a_data_set(snapshot):
    source = open_source("hub:some/stories", "text")
    assert list(source.read(lambda count: None)) == ["train-0", "train-1"]
    assert source.name == "hub:some/stories"
    options = {"repo_type": "dataset", "revision": None, "allow_patterns": "*train*.parquet"}
    assert snapshot == [("some/stories", options)]
    open_source("hub:some/stories", "text")
    assert len(snapshot) == 1  # asked once


def test_hub_reads_the_files_named(snapshot):
    assert read("hub:some/stories@v2/data/test-*.parquet") == ["test-0"]
    assert snapshot[0][1]["revision"] == "v2"
    assert snapshot[0][1]["allow_patterns"] == "data/test-*.parquet"
    with pytest.raises(UserError, match=r"data\.source: 'hub:some/stories/x': no file matches 'x'; see .*"):
        open_source("hub:some/stories/x", "text")
    for spec in ("stories", "/stories", "some/"):
        with pytest.raises(UserError, match="expected hub:<owner>/<name>"):
            open_source(f"hub:{spec}", "text")


@pytest.mark.parametrize("missing", [False, True])
def test_hub_that_cannot_be_reached(snapshot, monkeypatch, missing):
    import huggingface_hub
    from huggingface_hub import errors

    class NotFound(errors.RepositoryNotFoundError):
        def __init__(self):
            pass

    def fail(*_, **__):
        raise NotFound() if missing else ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    reason = "the hub has no such data set" if missing else "ConnectionError: no route to host; .* network"
    with pytest.raises(UserError, match=f"data.valid_source: 'hub:a/b': .*{reason}") as error:
        open_source("hub:a/b", "text", "data.valid_source")
    assert "\n" not in str(error.value)
