"""Sources of documents, named by specs such as "bundled" or "files:<glob>".

Opening a source hashes its files; documents are read later, one at a time. A document is a string, a list of
token ids from a "tokens:" source, or a conversation. Input is never imported, unpickled or executed.
"""

import ast
import codecs
import contextlib
import dataclasses
import difflib
import functools
import glob
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from mobilellm_jax.data import hub
from mobilellm_jax.data.chat import Conversation
from mobilellm_jax.data.compressed import CountedFile, OnRead, ZstdFile
from mobilellm_jax.data.parquet import check_column, is_parquet, read_column
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.sealed import parse

Document = str | list[int] | Conversation

_BLOCK = 1 << 20  # bytes
_MAX_TOKEN_ID = 2**31 - 1  # batches are int32


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents that can be read any number of times.

    Attributes:
      name: the spec, with directories left out.
      sha256: hash of the contents, names and order of its files.
      size: bytes that one reading reports to `on_read`, for a progress bar.
      read: yields the documents in a fixed order. It raises `UserError` for bad input.
      files: real paths of the files that are read whole; empty where there are none.
      is_one_text: a single plain-text file, which is a single document.
    """

    name: str
    sha256: str
    size: int
    read: Callable[[OnRead], Iterator[Document]]
    files: frozenset[str] = frozenset()
    is_one_text: bool = False


def open_source(spec: str, text_field: str, field: str = "data.source") -> Source:
    """Opens the source `spec`; errors begin with `field`.

    Raises:
      UserError: a file is missing, empty or not readable, a Parquet file has no such column, or a dataset
        cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if kind == "bundled":
        return _open_bundled(Path(sysconfig.get_path("stdlib")))
    if kind == "tfds":
        return _open_tfds(rest, text_field, field)
    if kind == "tokens":
        read = functools.partial(_read_jsonl, key="token_ids", check=_token_ids)
    else:
        read = functools.partial(_read_text_file, text_field=text_field)
    paths = list(hub.download(rest, field)) if kind == "hub" else matching_files(spec, rest, field)
    for path in filter(is_parquet, paths):
        check_column(path, text_field)
    return Source(
        name=spec if kind == "hub" else f"{kind}:{Path(rest).name}",
        sha256=hash_files({path: os.path.basename(path) for path in paths}),
        size=sum(os.path.getsize(path) for path in paths),
        read=lambda on_read: (document for path in paths for document in read(path, on_read)),
        files=frozenset(map(os.path.realpath, paths)),
        is_one_text=kind == "files" and len(paths) == 1 and not _is_table(paths[0]),
    )


def hash_files(names: dict[str, str]) -> str:
    """One hash of the files (path -> name that counts), in order."""
    entries = []
    for path, name in names.items():
        with _readable(path), open(path, "rb") as file:
            entries.append([name, hashlib.file_digest(file, "sha256").hexdigest()])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


# Files.


def matching_files(spec: str, pattern: str, field: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = [path for path in paths if os.path.isfile(path)]
    if not files:
        below = os.path.join(pattern, "**/*.txt")
        hint = f"; it is a directory: did you mean {below!r}?" if paths == [pattern] else ""
        raise UserError(f"{field}: {spec!r} matches no file{hint}")
    for path in files:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: the file is empty")
    return files


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turns errors of reading `path` into `UserError`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        kind = os.path.splitext(path)[1]
        raise UserError(f"{path}: truncated or not a valid {kind} file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def _open(path: str, on_read: OnRead) -> Iterator[io.BufferedIOBase]:
    """Opens a file for reading its decompressed bytes; UserError if it changes meanwhile."""
    with _readable(path):
        before = os.stat(path)
        with io.BufferedReader(CountedFile(path, on_read), _BLOCK) as raw:
            if path.endswith(".gz"):
                yield gzip.GzipFile(fileobj=raw)
            elif path.endswith(".xz"):
                yield cast(io.BufferedIOBase, lzma.LZMAFile(raw))  # noqa: SIM115  (needs no closing)
            elif path.endswith(".zst"):
                yield io.BufferedReader(ZstdFile(raw, path), _BLOCK)
            else:
                yield raw
        after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: the file changed while it was read; run again")


def _decode(path: str, data: bytes, offset: int) -> str:
    """UTF-8 text without byte order mark; `offset` is where `data` starts in the file."""
    if offset == 0 and data.startswith(codecs.BOM_UTF8):
        offset, data = len(codecs.BOM_UTF8), data[len(codecs.BOM_UTF8) :]
    where = data.find(b"\0")
    if where >= 0:
        raise UserError(f"{path}: not a text file: NUL at byte {offset + where}; expected UTF-8 text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at, byte = offset + error.start, data[error.start]
        raise UserError(f"{path}: not UTF-8 at byte {at} (0x{byte:02x}); expected UTF-8 text") from None


def _is_jsonl(path: str) -> bool:
    return path.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"))


def _is_table(path: str) -> bool:
    return _is_jsonl(path) or is_parquet(path)


def _read_text_file(path: str, on_read: OnRead, *, text_field: str) -> Iterator[Document]:
    if _is_jsonl(path):
        yield from _read_jsonl(path, on_read, key=text_field, check=_text)
        return
    if is_parquet(path):
        for number, value in read_column(path, text_field, on_read):
            yield _checked(value, _text, f"{path}, row {number}", text_field)
        return
    with _open(path, on_read) as file:
        text = _decode(path, b"".join(iter(lambda: file.read(_BLOCK), b"")), 0)
    if not text:
        raise UserError(f"{path}: the file is empty")
    yield text


def _read_jsonl(path: str, on_read: OnRead, key: str, check: Callable[[Any], Document]) -> Iterator[Document]:
    """Yields `check(row[key])` of every line."""
    for number, row in read_rows(path, on_read):
        where = f"{path}, line {number}"
        if key not in row:
            raise UserError(f"{where}: no field {key!r}; the row has the fields {', '.join(row)}")
        yield _checked(row[key], check, where, key)


def _checked(value: Any, check: Callable[[Any], Document], where: str, key: str) -> Document:
    try:
        return check(value)
    except ValueError as error:
        raise UserError(f"{where}: {key!r} {error}") from None


def read_rows(path: str, on_read: OnRead) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and the JSON object of every line of a jsonl file; blank lines are skipped."""
    offset, rows = 0, 0
    with _open(path, on_read) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(path, line, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = parse(text)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: invalid JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            rows += 1
            yield number, row
    if not rows:
        raise UserError(f"{path}: the file has no rows")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is of type {type(value).__name__}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8 and the tokenizers can't
        raise ValueError("contains half of a surrogate pair, which is not valid Unicode text") from None
    return value


def _token_ids(value: Any) -> list[int]:
    # type(), because isinstance would let true and false pass
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("is not a list of integers")
    if value and not 0 <= min(value) <= max(value) <= _MAX_TOKEN_ID:
        bad = min(value) if min(value) < 0 else max(value)
        raise ValueError(f"contains {bad}; expected token ids from 0 to {_MAX_TOKEN_ID}")
    return value


# The text that every CPython ships.

# Left out or packaged separately by some distributions; without them, one version always gives one text.
_NOT_BUNDLED = (
    *("test", "tests", "site-packages", "dist-packages", "__pycache__"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
)


@functools.cache  # a sweep opens it for every run: 0.08 s to look through 512 files
def _open_bundled(stdlib: Path) -> Source:
    """The topics of Python's `help()` and the docstrings of the standard library."""
    paths = {}
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_BUNDLED and "-" not in name)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # written when Python is built
                path = Path(folder, name)
                paths[str(path)] = path.relative_to(stdlib).as_posix()
    if "pydoc_data/topics.py" not in paths.values():
        raise UserError(f"data.source: 'bundled' needs the standard library's .py files in {stdlib}")

    def read(on_read: OnRead) -> Iterator[Document]:
        for path, name in paths.items():
            yield from _docstrings(path, name)
            on_read(os.path.getsize(path))

    size = sum(os.path.getsize(path) for path in paths)
    return Source(name="bundled", sha256=hash_files(paths), size=size, read=read)


@functools.cache  # 2 MB in all, and parsing is slow: training a tokenizer and packing are two readings
def _docstrings(path: str, name: str) -> tuple[str, ...]:
    """The documents of one module: all its docstrings as one, or each topic of `pydoc_data.topics`."""
    with _readable(path), open(path, "rb") as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have invalid escapes
        tree = ast.parse(source)
    if name == "pydoc_data/topics.py":
        (topics,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
        return tuple(ast.literal_eval(topics).values())
    text = "\n\n".join(_docstrings_of(tree))
    return (text + "\n",) if text else ()


def _docstrings_of(tree: ast.Module) -> Iterator[str]:
    """Yields docstrings in the order written. Only statements are visited: most nodes are expressions."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        for block in ("finalbody", "orelse", "handlers", "body"):
            stack.extend(reversed(getattr(node, block, ())))


# TensorFlow Datasets.

_TFDS_TEXT = ("text", "text_simplification", "summarization", "question_answering", "translate", "structured")


def _open_tfds(spec: str, text_field: str, field: str) -> Source:
    """Opens "<name>[/<config>][:<version>][/<split>]", preparing the dataset at first use."""
    import tensorflow_datasets as tfds  # here: half a second that other sources need not spend

    what = f"{field}: 'tfds:{spec}'"
    try:
        name, split = _tfds_name_and_split(tfds, spec)
        builder: Any = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
        examples = builder.as_data_source(split=split)
        files = {str(path): os.path.basename(path) for path in builder.info.splits[split].filepaths}
        fields = list(builder.info.features)
    except ImportError as error:
        package = (error.name or "tensorflow").partition(".")[0]
        raise UserError(
            f"{what}: cannot be built without the package {package!r}: {_first_line(error)}; run "
            f"`pip install {package}` (needed only until the dataset is prepared)"
        ) from None
    except Exception as error:  # TFDS raises whatever its downloads, builders and file systems raise
        if type(error).__name__ == "DatasetNotFoundError":
            near = difflib.get_close_matches(spec.partition("/")[0], _tfds_builders(tfds))
            hint = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets/catalog"
            raise UserError(f"{what}: TFDS has no such dataset; {hint}") from None
        raise UserError(
            f"{what}: cannot be loaded: {type(error).__name__}: {_first_line(error)}; the first use needs "
            "the network, or a prepared copy in the directory TFDS_DATA_DIR"
        ) from None
    if text_field not in fields:
        raise UserError(
            f"{what}: no field {text_field!r} (data.text_field); the fields are {', '.join(fields)}"
        )
    size = sum(os.path.getsize(path) for path in files)

    def read(on_read: OnRead) -> Iterator[Document]:
        for start in range(0, len(examples), 256):  # one by one is ten times slower
            chunk = examples.__getitems__(range(start, min(start + 256, len(examples))))
            for index, example in enumerate(chunk, start):
                value = example[text_field]
                if not isinstance(value, bytes | str):
                    raise UserError(f"{what}: {text_field!r} of example {index} is not text")
                yield value.decode() if isinstance(value, bytes) else value
            on_read(size * len(chunk) // len(examples))

    return Source(name=f"tfds:{spec}", sha256=hash_files(files), size=size, read=read)


def _tfds_name_and_split(tfds: Any, spec: str) -> tuple[str, str]:
    """Splits the spec; a second part is a config where the dataset has one of that name, else the split."""
    name, *rest = spec.split("/")
    dataset = name.partition(":")[0]
    if dataset not in _tfds_builders(tfds):
        # TFDS stops registering builders at the first that fails to import: image datasets need TensorFlow
        for group in _TFDS_TEXT:
            with contextlib.suppress(ImportError):
                importlib.import_module(f"tensorflow_datasets.{group}")
    # a dataset may also be prepared files alone, without a builder
    configs = tfds.builder_cls(dataset).builder_configs if dataset in _tfds_builders(tfds) else ()
    if rest and rest[0].partition(":")[0] in configs:
        name = f"{name}/{rest.pop(0)}"
    return name, "/".join(rest) or "train"


def _tfds_builders(tfds: Any) -> list[str]:
    return tfds.list_builders(with_community_datasets=False)  # community datasets need a network request


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
