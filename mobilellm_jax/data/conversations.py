"""Sources of conversations: "conversations:<glob>" reads files, "api_calls:..." generates."""

import functools
import os
from collections.abc import Iterator
from typing import Any

from mobilellm_jax.data.api_calls import open_api_calls
from mobilellm_jax.data.chat import Conversation, conversation_of
from mobilellm_jax.data.sources import OnRead, Source, hash_files, matching_files, open_source, read_rows
from mobilellm_jax.errors import UserError


def open_any(spec: str, text_field: str, field: str = "data.source") -> Source:
    """Opens the source `spec`, of conversations or of any other documents; errors begin with `field`.

    Raises:
      UserError: as `sources.open_source`, or what the spec says of generated conversations is not valid.
    """
    kind, _, rest = spec.partition(":")
    if kind == "api_calls":
        return open_api_calls(spec, field)
    if kind != "conversations":
        return open_source(spec, text_field, field)
    paths = matching_files(spec, rest, field)
    return Source(
        name=f"conversations:{os.path.basename(rest)}",
        sha256=hash_files({path: os.path.basename(path) for path in paths}),
        size=sum(os.path.getsize(path) for path in paths),
        read=functools.partial(_read, paths),
        files=frozenset(map(os.path.realpath, paths)),
    )


def read_valid(spec: str, field: str) -> tuple[list[Conversation], dict[str, Any]]:
    """All conversations of "conversations:<glob>" that are valid, for evaluation, and what they are.

    Raises:
      UserError: a file cannot be read, or no conversation is valid; the message names the first that is not.
    """
    paths = matching_files(spec, spec.partition(":")[2], field)
    found, errors = [], []
    for path in paths:
        for number, row in read_rows(path, lambda count: None):
            try:
                found.append(conversation_of(row))
            except ValueError as error:
                errors.append(f"{path}, line {number}: {error}")
    if not found:
        raise UserError(errors[0])
    names = {path: os.path.basename(path) for path in paths}
    source = f"conversations:{os.path.basename(spec.partition(':')[2])}"
    return found, {"source": source, "sha256": hash_files(names), "left_out": len(errors)}


def _read(paths: list[str], on_read: OnRead) -> Iterator[Conversation]:
    for path in paths:
        for number, row in read_rows(path, on_read):
            try:
                yield conversation_of(row)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
