"""Sources of conversations: "conversations:<glob>" reads files."""

import functools
import os
from collections.abc import Iterator

from mobilellm_jax.data.chat import Conversation, conversation_of
from mobilellm_jax.data.sources import OnRead, Source, hash_files, matching_files, open_source, read_rows
from mobilellm_jax.errors import UserError


def open_any(spec: str, text_field: str, field: str = "data.source") -> Source:
    """Opens the source `spec`, of conversations or of any other documents; errors begin with `field`.

    Raises:
      UserError: as `sources.open_source`, or what the spec says of generated conversations is not valid.
    """
    kind, _, rest = spec.partition(":")
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


def _read(paths: list[str], on_read: OnRead) -> Iterator[Conversation]:
    for path in paths:
        for number, row in read_rows(path, on_read):
            try:
                yield conversation_of(row)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
