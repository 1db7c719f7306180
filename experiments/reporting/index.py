"""The index of all reports in a folder, each with its question and answer."""

import re
from urllib.parse import quote

from experiments.reporting import pages
from mobilellm_jax.storage.files import AnyPath, path_of


def write(workdir: str | AnyPath) -> AnyPath:
    """Writes reports/index.html and .md: every report there with its question and answer.

    Returns the path without the suffix.
    """
    folder = path_of(workdir) / "reports"
    items = []
    for page in sorted(folder.glob("*.md"), key=lambda page: page.name):
        lines = page.read_text(encoding="utf-8").splitlines()
        if page.stem != pages.INDEX and lines and lines[0].startswith("# "):
            lead = lines[2] if len(lines) > 2 and re.match(r"(?!Contents:)[^#|!*-]", lines[2]) else ""
            question = _unescaped(lines[0].removeprefix("# "))
            items.append((page.stem, quote(page.name), f": {question} {_unescaped(lead)}".rstrip()))
    return pages.write_page(pages.INDEX, "All reports", [("", [pages.Links(items)])], workdir)


def _unescaped(line: str) -> str:
    """The text of a line that `tables.plain` has escaped."""
    return re.sub(r"\\([\\`*<\]])", r"\1", line).replace("&amp;", "&")
