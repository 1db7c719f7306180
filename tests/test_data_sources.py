"""Sources: what every spec yields, and one clear error for each kind of bad input."""

import gzip
import itertools
import json
import lzma
import os
import sys

import pytest
import zstandard

from mobilellm_jax.data import sources
from mobilellm_jax.data.sources import Source, open_source
from mobilellm_jax.errors import UserError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def documents(source: Source) -> list[sources.Document]:
    return list(source.read(lambda count: None))


def read(spec: str, text_field: str = "text") -> list[sources.Document]:
    return documents(open_source(spec, text_field))


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("kind", "name", "content", "expected"),
    [
        ("files", "a.txt", "Grüße\r\nan alle\n".encode(), ["Grüße\r\nan alle\n"]),
        ("files", "a", b"no extension", ["no extension"]),
        ("files", "a.jsonl", jsonl({"text": "one"}, {"text": "two\n", "id": 2}), ["one", "two\n"]),
        ("tokens", "a.jsonl", jsonl({"token_ids": [3, 1, 2]}, {"token_ids": []}), [[3, 1, 2], []]),
    ],
)
def test_reads_every_kind_of_file(tmp_path, suffix, kind, name, content, expected):
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](content))
    source = open_source(f"{kind}:{path}", "text")
    counts = []
    assert list(source.read(counts.append)) == expected
    assert documents(source) == expected  # and again
    assert sum(counts) == source.size == path.stat().st_size
    assert source.name == f"{kind}:{path.name}"


def test_missing_zstandard_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        UserError, match=r"a\.txt\.zst: zstd needs zstandard: python -m pip install .*\[zstd\]"
    ):
        read(f"files:{tmp_path}/a.txt.zst")


def test_zstd_frames_one_after_the_other(tmp_path):
    big = os.urandom(300_000).hex()
    parts = [big[:250_000], big[250_000:], "end"]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(zstandard.compress(part.encode()) for part in parts))
    assert read(f"files:{tmp_path}/a.txt.zst") == [big + "end"]


def test_globs_are_sorted_recursive_and_expand_home(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("files:~/*.txt") == ["a.txt", "b.txt"]
    assert read("files:~/**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    (tmp_path / "x[1].txt").write_text("brackets")
    assert read("files:~/x[1].txt") == ["brackets"]


def test_byte_order_mark_and_blank_lines_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(
        b"\xef\xbb\xbf" + jsonl({"text": "one"}) + b"\n  \n" + jsonl({"text": "two"})
    )
    assert read(f"files:{tmp_path}/*") == ["hello", "one", "two"]


def test_jsonl_is_read_as_a_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl({"text": "x" * 1000}) * 5000)  # 5 MB
    counts = []
    first = next(iter(open_source(f"files:{path}", "text").read(counts.append)))
    assert first == "x" * 1000
    assert sum(counts) <= 1 << 20


def test_other_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "no", "content": "yes"}))
    assert read(f"files:{tmp_path}/a.jsonl", "content") == ["yes"]


def test_hash_is_of_contents_and_names_not_of_directories(tmp_path):
    def sha256(folder: str, **files: str) -> str:
        for name, content in files.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(content)
        return open_source(f"files:{tmp_path / folder}/*", "text").sha256

    one = sha256("one", a="text", b="more")
    assert sha256("two", a="text", b="more") == one
    others = {
        sha256("three", a="texT", b="more"),
        sha256("four", a="text", c="more"),
        sha256("five", a="textmore"),
    }
    assert len(others | {one}) == 4


LATIN = "Grüße".encode("latin-1")
BAD_FILES = [
    ("files", "a.txt", b"", "a.txt: the file is empty"),
    ("files", "a.txt", b"\xef\xbb\xbf", "a.txt: the file is empty"),
    ("files", "a.txt.xz", b"", "a.txt.xz: the file is empty"),
    # No time in it: it is part of the test's name, which all workers must agree on.
    ("files", "a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz: the file is empty"),
    ("files", "a.txt", b"ab\0cd", "a.txt: not a text file: NUL at byte 2"),
    ("files", "a.txt", b"\xef\xbb\xbfab\0cd", "NUL at byte 5"),
    ("files", "a.txt", LATIN, r"a.txt: not UTF-8 at byte 2 \(0xfc\)"),
    ("files", "a.txt", b"\xef\xbb\xbf" + LATIN, "not UTF-8 at byte 5"),
    (
        "files",
        "a.jsonl",
        jsonl({"text": "x"}) + b'{"text": "' + LATIN + b'"}',
        "a.jsonl: not UTF-8 at byte 26",
    ),
    ("files", "a.jsonl", b"\n\n", "a.jsonl: the file has no rows"),
    ("files", "a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3: invalid JSON"),
    ("files", "a.jsonl", b"[" * 100_000, "a.jsonl, line 1: invalid JSON"),
    (
        "files",
        "a.jsonl",
        jsonl({"id": 1, "body": "x"}),
        "line 1: no field 'text'; the row has the fields id, body",
    ),
    ("files", "a.jsonl", jsonl(["text"]), "line 1: expected a JSON object"),
    (
        "files",
        "a.jsonl",
        jsonl({"text": "x"}, {"text": None}),
        "line 2: 'text' is of type NoneType; expected a string",
    ),
    ("files", "a.jsonl", b'{"text": "\\ud800"}', "line 1: 'text' contains half of a surrogate pair"),
    ("tokens", "a.jsonl", jsonl({"text": "x"}), "line 1: no field 'token_ids'; the row has the fields text"),
    (
        "tokens",
        "a.jsonl",
        jsonl({"token_ids": [1, -2]}),
        "line 1: 'token_ids' contains -2; expected token ids from 0",
    ),
    (
        "tokens",
        "a.jsonl",
        jsonl({"token_ids": [1, 2**31]}),
        "contains 2147483648; expected token ids from 0 to 2147483647",
    ),
    ("tokens", "a.jsonl", jsonl({"token_ids": [1, 2.0]}), "'token_ids' is not a list of integers"),
    ("tokens", "a.jsonl", jsonl({"token_ids": [1, True]}), "'token_ids' is not a list of integers"),
    ("tokens", "a.jsonl", jsonl({"token_ids": "1 2"}), "'token_ids' is not a list of integers"),
    ("files", "a.txt.gz", b"plain text", "a.txt.gz: truncated or not a valid .gz file"),
    ("files", "a.txt.xz", b"plain text", "a.txt.xz: truncated or not a valid .xz file"),
    ("files", "a.txt.zst", b"plain text", "a.txt.zst: truncated or not a valid .zst file"),
]


@pytest.mark.parametrize(("kind", "name", "content", "message"), BAD_FILES)
def test_bad_file(tmp_path, kind, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(f"{kind}:{tmp_path}/{name}")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
def test_truncated_file(tmp_path, suffix, kept):
    content = COMPRESS[suffix](jsonl(*({"text": os.urandom(20).hex()} for _ in range(2000))))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=f"a.jsonl{suffix}: truncated or not a valid {suffix} file"):
        read(f"files:{path}")


@pytest.mark.parametrize("name", ["none.txt", "*.none"])
def test_no_file(tmp_path, name):
    with pytest.raises(UserError, match=r"^data\.valid_source: 'files:.*' matches no file$"):
        open_source(f"files:{tmp_path}/{name}", "text", "data.valid_source")


def test_directory_instead_of_files(tmp_path):
    with pytest.raises(UserError, match=r"^data\.source: 'files:.*' matches no file; it is a directory"):
        open_source(f"files:{tmp_path}", "text")


def test_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl({"text": "x"}) * 3)
    reading = open_source(f"files:{path}", "text").read(lambda count: None)
    next(reading)
    path.write_bytes(jsonl({"text": "y"}) * 4)
    with pytest.raises(UserError, match=r"a\.jsonl: the file changed while it was read"):
        list(reading)


MODULE = '''
"""Module
   doc."""
raise SystemExit("this module was run")
PATTERN = "\\d"  # an invalid escape
if PATTERN:
    class A:
        """Class doc."""
        def f(self):
            """Method doc."""
            def g(): "Inner doc."
        x = 1
        "Not a docstring."
    try:
        pass
    except ValueError:
        async def h():
            """Handler doc."""
'''


def test_bundled_takes_docstrings_in_the_order_written(tmp_path):
    files = {
        "pydoc_data/topics.py": 'topics = {"z": "Topic z.\\n", "a": "Topic a.\\n"}\n',
        "pydoc_data/__init__.py": "",
        "b.py": MODULE,
        "a.py": '"First."',
        "test/c.py": '"Skipped."',
        "pkg/tests/d.py": '"Skipped."',
        "site-packages/e.py": '"Skipped."',
        "config-3.11-linux/f.py": '"Skipped."',
        "idlelib/g.py": '"Skipped."',
        "_sysconfigdata_x.py": '"Skipped."',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    open_bundled = sources._open_bundled.__wrapped__  # as in another process: it is cached
    source = open_bundled(tmp_path)
    module = "\n\n".join(["Module\ndoc.", "Class doc.", "Method doc.", "Inner doc.", "Handler doc."]) + "\n"
    assert documents(source) == ["First.\n", module, "Topic z.\n", "Topic a.\n"]
    (tmp_path / "a.py").write_text('"Second."')
    assert open_bundled(tmp_path).sha256 != source.sha256
    (tmp_path / "pydoc_data/topics.py").unlink()
    with pytest.raises(
        UserError, match=r"^data\.source: 'bundled' needs the standard library's \.py files in"
    ):
        open_bundled(tmp_path)


def test_bundled_is_english_and_imports_nothing():
    loaded = set(sys.modules)
    texts = [str(document) for document in read("bundled")]
    assert {name for name in set(sys.modules) - loaded if not name.startswith("encodings")} == set()
    assert 1_500_000 < sum(len(text.encode()) for text in texts) < 3_000_000
    assert len(texts) > 300
    assert any(
        "Remove any common leading whitespace from every line" in text for text in texts
    )  # textwrap.dedent
    assert any(text.startswith('The "assert" statement\n') for text in texts)  # a topic


# TFDS, with a builder of our own; nothing is downloaded.


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets  # slow to import

    return tensorflow_datasets


@pytest.fixture
def dataset(tfds, tmp_path, monkeypatch):
    """Registers a dataset "mlj_tiny_<n>" whose examples come from a function; returns its name."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(tfds.core.dataset_builder.constants, "DATA_DIR", str(tmp_path / "tfds"))

    def register(generate, configs=()):
        dataset_name = f"mlj_tiny_{next(_numbers)}"
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})

        class Tiny(tfds.core.GeneratorBasedBuilder):
            name = dataset_name
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config) for config in configs]  # noqa: RUF012

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                config = self.builder_config.name if self.builder_config else ""
                return {split: generate(f"{config}{split}") for split in ("train", "test")}

            def _generate_examples(self):
                raise AssertionError("nothing is built")

        return dataset_name

    return register


_numbers = itertools.count()


def examples(split):
    for i in range(300):
        yield i, {"text": f"{split} {i}: Grüße"}


def test_tfds_reads_a_split_without_tensorflow(dataset):
    name = dataset(examples)
    texts = read(f"tfds:{name}")
    assert sorted(map(str, texts)) == sorted(f"train {i}: Grüße" for i in range(300))
    assert read(f"tfds:{name}") == texts
    assert {str(text).split()[0] for text in read(f"tfds:{name}/test")} == {"test"}
    assert read(f"tfds:{name}/train[:10]") == texts[:10]
    source = open_source(f"tfds:{name}", "text")
    counts = []
    list(source.read(counts.append))
    assert 0 < sum(counts) <= source.size
    assert source.sha256 != open_source(f"tfds:{name}/test", "text").sha256
    assert "tensorflow" not in sys.modules


def test_tfds_config_or_split(dataset):
    name = dataset(examples, configs=("en", "de"))
    assert str(read(f"tfds:{name}")[0]).startswith("entrain ")
    assert str(read(f"tfds:{name}/de")[0]).startswith("detrain ")
    assert str(read(f"tfds:{name}/de/test")[0]).startswith("detest ")
    assert str(read(f"tfds:{name}/test")[0]).startswith("entest ")


def needs_tensorflow(split):
    raise ImportError("No module named 'tensorflow'", name="tensorflow")


def needs_network(split):
    raise ConnectionError("Name or service not known")


@pytest.mark.parametrize(
    ("generate", "suffix", "field", "message"),
    [
        (examples, "/nope", "text", r"cannot be loaded: ValueError: Unknown split 'nope'.*'test'"),
        (examples, "", "body", r"no field 'body' \(data.text_field\); the fields are text"),
        (
            needs_tensorflow,
            "",
            "text",
            "cannot be built without the package 'tensorflow'.*`pip install tensorflow`",
        ),
        (
            needs_network,
            "",
            "text",
            "cannot be loaded: ConnectionError: Name or service not known; .*TFDS_DATA_DIR",
        ),
    ],
)
def test_tfds_errors(dataset, generate, suffix, field, message):
    with pytest.raises(UserError, match=rf"^data\.source: 'tfds:mlj_tiny_\d+{suffix}':? {message}"):
        read(f"tfds:{dataset(generate)}{suffix}", field)


def test_tfds_unknown_name(tfds):
    with pytest.raises(
        UserError, match=r"'tfds:imdb_review': TFDS has no such dataset; did you mean imdb_reviews"
    ):
        read("tfds:imdb_review")


def test_tfds_finds_old_builders(tfds):
    name, split = sources._tfds_name_and_split(tfds, "wikipedia/20230601.en")
    assert (name, split) == ("wikipedia/20230601.en", "train")
    assert tfds.builder_cls("c4")
