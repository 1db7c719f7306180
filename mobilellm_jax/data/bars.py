"""How far the reading of a text is."""

import contextlib
import sys
from collections.abc import Iterator

from absl import logging
from tqdm import tqdm

from mobilellm_jax.data.sources import OnRead, Source


@contextlib.contextmanager
def reading(what: str, sources: list[Source]) -> Iterator[OnRead]:
    """Shows the bytes of input read so far: a bar on a terminal, else a line at each end of the log."""
    size = sum(source.size for source in sources)
    if sys.stderr.isatty():
        with tqdm(desc=what, total=size, unit="B", unit_scale=True) as bar:
            yield bar.update
    else:
        logging.info("%s: %.1f MB", what, size / 1e6)
        yield lambda count: None
        logging.info("%s: done", what)
