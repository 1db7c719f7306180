"""All figures on one page, each with links to its config, command, records and report."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from experiments.reporting import figures, paper_tables
from experiments.reporting.tables import plain
from mobilellm_jax.analysis.facts import Facts
from mobilellm_jax.analysis.study import Study, file_stem
from mobilellm_jax.storage.files import AnyPath, is_bucket

CONFIGS = Path(__file__).parents[2] / "configs"


def section(drawn: Sequence[tuple[Study, Mapping[str, figures.Image]]], workdir: AnyPath) -> str:
    """Writes the gallery as Markdown, for a page in `workdir`; the studies of the paper come first.

    Args:
      drawn: each study at each preset, and its figures by suffix.
      workdir: where results/, reports/ and figures/ are.
    """
    parts = ["## All figures"]
    for study, images in sorted(drawn, key=lambda one: one[0].facts.study not in paper_tables.SOURCES):
        facts = study.facts
        shown = images.get("-paper", images[""])
        others = [image for image in images.values() if image is not shown]
        first, *rest = commands(study)
        more = " and other commands, see the report" * bool(rest)
        parts += [
            f"### {plain(f'{facts.study}, {facts.preset}'.removesuffix(', '))}",
            plain(facts.question),
            f"![{plain(facts.question)} {shown.alt}]({_figure(shown)})",
            "  \n".join(
                [
                    f"Also drawn: {', '.join(f'[{image.alt}]({_figure(image)})' for image in others)}.",
                    f"{', '.join(_links(study, workdir))}. To make it again: `{first}`{more}",
                ]
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _figure(image: figures.Image) -> str:
    return f"figures/{quote(image.name)}"


def _links(study: Study, workdir: AnyPath) -> list[str]:
    facts = study.facts
    links = [f"[Report](reports/{quote(study.stem)}.md)"]
    if (config := _config(facts)).is_file() and not is_bucket(workdir):
        links.append(f"[config]({quote(os.path.relpath(config, workdir))})")
    if (workdir / (folder := f"results/{facts.study}/{facts.preset}".rstrip("/"))).is_dir():
        links.append(f"[{len(study.runs)} records]({quote(folder)})")
    return links


def _config(facts: Facts) -> Path:
    return CONFIGS / f"{file_stem(facts.study)}.py"


def commands(study: Study) -> list[str]:
    """Commands that made the records, the one for most of the study first.

    Without the directory, where they are already done. One without --config ran what was the default study
    then, and is left out where others say more.
    """
    found = {re.sub(r" --workdir=\S+", "", run.command.replace("`", "'")) for run in study.runs}
    found = {" ".join(command.split()) for command in found}
    found = {command for command in found if "--config=" in command} or found
    own = f"/{_config(study.facts).name}"
    return sorted(found, key=lambda command: (own not in command, "--only" in command, len(command), command))
