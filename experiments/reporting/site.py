"""Pages of the documentation: parts that are generated, and links, which a site has to have its own of.

Pages are written for the repository, where a link may lead to any file. A site has pages only, so links to
other files lead to the repository on the web.
"""

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from mobilellm_jax.errors import UserError

# The pages beside docs/ that are part of the site.
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "experiments/claims.md", "experiments/reports/*.md")
IMAGES = (".png", ".svg")
_FENCE = re.compile(r"^( *)(```+|~~~+)")
# A span of code, which holds no links, or the target of a link.
_LINK = re.compile(r"`[^`\n]*`|(?<=\]\()([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?=\))")


def fill(text: str, name: str, content: str) -> str:
    """Puts `content` between the comments `<!-- begin: name -->` and `<!-- end: name -->`.

    Raises:
      ValueError: the text does not have both, once and in this order.
    """
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    before, *rest = text.split(begin)
    _, *after = rest[0].split(end) if len(rest) == 1 else [""]
    if len(after) != 1:
        raise ValueError(f"expected {begin.strip()} and {end} once each, in this order")
    return f"{before}{begin}\n{content.strip()}\n\n{end}{after[0]}"


def prose(page: str) -> Iterable[tuple[str, bool]]:
    """The lines of a page, each with whether it is prose: not in a block of code."""
    fence = ""
    for line in page.splitlines(keepends=True):
        opening = _FENCE.match(line)
        if fence:
            yield line, False
            if line.strip() == fence:
                fence = ""
        elif opening:
            yield line, False
            fence = opening[2]
        else:
            yield line, True


def links(page: str) -> list[str]:
    """The targets of all links and images of a page, in order; those in code are none."""
    lines = [line for line, is_prose in prose(page) if is_prose]
    return [target for line in lines for target in _LINK.findall(line) if target]


def is_relative(target: str) -> bool:
    """True for a link to a file of the repository, or to a place on the page."""
    return not re.match(r"[a-z]+:", target)


def gather(root: Path, target: Path, repository: str) -> list[Path]:
    """Copies all pages of the site and their images to `target`, and makes their links those of the site.

    Args:
      root: the repository, which holds docs/.
      target: an empty or new folder.
      repository: address of the repository on the web.

    Returns:
      The pages, as paths in the site.

    Raises:
      UserError: a link leads to a file that does not exist.
    """
    pages = sorted({*root.glob("docs/**/*.md"), *(path for name in BESIDE for path in root.glob(name))})
    for page in pages:
        lines = prose(page.read_text(encoding="utf-8"))
        put = functools.partial(_on_site, page=page, pages=pages, root=root, target=target, web=repository)
        text = "".join(_LINK.sub(put, line) if is_prose else line for line, is_prose in lines)
        copy = target / _place(page.relative_to(root))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    for asset in root.glob("docs/assets/*"):
        (target / "assets").mkdir(exist_ok=True)
        (target / "assets" / asset.name).write_bytes(asset.read_bytes())
    return [_place(page.relative_to(root)) for page in pages]


def _place(path: Path) -> Path:
    """The path in the site of a file of the repository."""
    return path.relative_to("docs") if path.parts[0] == "docs" else path


def _on_site(
    found: re.Match[str], *, page: Path, pages: list[Path], root: Path, target: Path, web: str
) -> str:
    """What stands in the site for a match of `_LINK` on a page; copies an image that it leads to."""
    link = found[1]
    if link is None:
        return found[0]
    name, mark, anchor = link.partition("#")
    if not is_relative(link) or not name:
        return link
    file = Path(os.path.normpath(page.parent / unquote(name)))
    if not file.exists() or not file.is_relative_to(root):
        raise UserError(f"{page.relative_to(root)}: the link {link} leads to no file of the repository")
    path = file.relative_to(root)
    if file not in pages and file.suffix not in IMAGES:
        kind = "tree" if file.is_dir() else "blob"
        return f"{web}/{kind}/main/{quote(path.as_posix())}{mark}{anchor}"
    if file.suffix in IMAGES:
        copy = target / _place(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    here = _place(page.relative_to(root)).parent
    return quote(Path(os.path.relpath(_place(path), here)).as_posix()) + mark + anchor
