"""Parquet files: one column of text, read in batches of rows. pyarrow is an extra."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from mobilellm_jax.errors import UserError, of_extra

_ROWS = 256  # read at a time


def is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


def check_column(path: str, text_field: str) -> None:
    """Raises UserError unless the file has a column `text_field` of strings."""
    with _opened(path) as file:
        schema = file.schema_arrow
        kinds = {column.name: str(column.type) for column in schema}
    columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if text_field not in kinds:
        raise UserError(f"{path}: no column {text_field!r} (data.text_field); the columns are {columns}")
    if "string" not in kinds[text_field]:
        raise UserError(
            f"{path}: the column {text_field!r} (data.text_field) has no text; the columns are {columns}"
        )


def read_column(path: str, text_field: str, on_read: Callable[[int], object]) -> Iterator[tuple[int, Any]]:
    """Yields the number, from 1, and the value of a column in every row.

    `on_read` gets the share of the file's bytes that belongs to the rows read.

    Raises:
      UserError: the file is not Parquet, or has no rows.
    """
    size, done = os.path.getsize(path), 0
    with _opened(path) as file:
        total = file.metadata.num_rows
        if not total:
            raise UserError(f"{path}: the file has no rows")
        for batch in file.iter_batches(_ROWS, columns=[text_field]):
            values = batch.column(batch.schema.names.index(text_field)).to_pylist()
            yield from enumerate(values, start=done + 1)
            on_read(size * (done + len(values)) // total - size * done // total)
            done += len(values)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    arrow, parquet = (
        of_extra(name, "parquet", f"{path}: Parquet") for name in ("pyarrow", "pyarrow.parquet")
    )
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except UserError:  # a ValueError, as Arrow's are
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a value is not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except arrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: truncated or not a valid .parquet file ({reason})") from None
