"""All figures on one page, each with links to its config, command, records and report."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from experiments.reporting import figures, paper_tables
from experiments.reporting.tables import plain
from mobilellm_jax.analysis.records import Record, newest
from mobilellm_jax.storage.files import AnyPath, is_bucket

CONFIGS = Path(__file__).parents[2] / "configs"


def section(drawn: Sequence[tuple[Sequence[Record], Mapping[str, figures.Image]]], workdir: AnyPath) -> str:
    """Returns the gallery in Markdown, for a page in `workdir`; the studies of the paper come first.

    Args:
      drawn: the records of each study at each preset, and its figures by suffix.
      workdir: where results/, reports/ and figures/ are.
    """
    parts = ["## All figures"]
    for records, images in sorted(
        drawn, key=lambda study: newest(study[0]).study not in paper_tables.SOURCES
    ):
        facts = newest(records)
        shown = images.get("-paper", images[""])
        others = [image for image in images.values() if image is not shown]
        parts += [
            f"### {plain(f'{facts.study}, {facts.preset}'.removesuffix(', '))}",
            plain(facts.question),
            f"![{plain(facts.question)} {shown.alt}]({_figure(shown)})",
            "  \n".join(
                [
                    f"Also drawn: {', '.join(f'[{image.alt}]({_figure(image)})' for image in others)}.",
                    f"{', '.join(_links(records, workdir))}. To make it again: `{_command(facts)}`",
                ]
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _figure(image: figures.Image) -> str:
    return f"figures/{quote(image.name)}"


def _links(records: Sequence[Record], workdir: AnyPath) -> list[str]:
    facts = newest(records)
    links = [f"[Report](reports/{quote(figures.stem(records))}.md)"]
    if (config := _config(facts)).is_file() and not is_bucket(workdir):
        links.append(f"[config]({quote(os.path.relpath(config, workdir))})")
    if (workdir / (folder := f"results/{facts.study}/{facts.preset}".rstrip("/"))).is_dir():
        links.append(f"[{len(records)} records]({quote(folder)})")
    return links


def _config(facts: Record) -> Path:
    return CONFIGS / f"{figures.stem([facts]).removesuffix(f'-{facts.preset}')}.py"


def _command(facts: Record) -> str:
    """Returns the command for all points; those that made the records are in the report."""
    if not _config(facts).is_file():
        return " ".join(facts.command.replace("`", "'").split())
    preset = f":{facts.preset}" if facts.preset else ""
    return f"python -m experiments.sweep --config=configs/{_config(facts).name}{preset}"
