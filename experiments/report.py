"""Writes tables, figures and a report of every study from its records alone: no training, no jax.

    python -m experiments.report [--workdir=experiments]

reads <workdir>/results/**.json and writes, for each study and preset,

    reports/<study>-<preset>.html   everything in one file, figures included
    reports/<study>-<preset>.md     the same; its figures are those in figures/
    figures/                        see `reporting.figures`

and figures/ and reports/playground-<size>, with all abilities of the playground, and claims.md: what the
paper claims beside what the records say, and all figures, with links to config, command and records. The
same records give the same bytes.
"""

from experiments import cli
from experiments.reporting import abilities, claims, figures, gallery
from experiments.reporting.pages import write_report
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath, path_of, write_atomically


def redraw(workdir: str | AnyPath) -> None:
    """Reports every study that has records in `workdir`, and prints the findings.

    Raises:
      UserError: there are no records, one is damaged, a claims.md is there that this did not write, or the
        runs of a study cannot be compared; the other studies are reported all the same.
    """
    page = path_of(workdir) / "claims.md"
    if page.exists() and not page.read_text(encoding="utf-8").startswith(claims.TITLE):
        raise UserError(
            f"{page}: refusing to overwrite, this command did not write it; choose another --workdir"
        )
    studies, refused = figures.read_studies(workdir)
    drawn = []
    for study in studies:
        images = figures.write(study, workdir)
        print(write_report(study, images, workdir), end="\n\n")
        drawn.append((study, images))
    for said in abilities.write(studies, workdir):
        print(said, end="\n\n")
    text = "\n".join([claims.page(studies), gallery.section(drawn, path_of(workdir))])
    write_atomically(page, text.encode())
    print(f"Claims and all figures: {page}")
    if refused:
        raise UserError("\n".join(refused))


if __name__ == "__main__":
    cli.run_on_records(redraw, "results/, reports/ and figures/")
