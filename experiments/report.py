"""Writes tables, figures and a report of every study from its records alone: no training, no jax.

    python -m experiments.report [--workdir=experiments]
    python -m experiments.report --workdir=runs --formats=png,svg,pdf,tex   # for a paper
    python -m experiments.report --workdir=runs --against=runs/again   # do two experiments agree?

The first reads <workdir>/results/**.json and writes, for each study and preset,

    reports/<study>-<preset>.html   everything in one file, figures included
    reports/<study>-<preset>.md     the same; its figures are those in figures/
    reports/index.html, .md         all of them, with question and answer
    figures/                        see `reporting.figures`

and figures/ and reports/playground-<size>, with all abilities of the playground, reports/second_use, what a
further use of blocks is worth in each study that asks, and claims.md: what the paper claims beside what the
records say, and all figures, with links to config, command and records. The same records give the same bytes.
The last compares the findings about every pair that both directories have, and writes nothing.
"""

from collections.abc import Collection

from absl import flags

from experiments import cli
from experiments.reporting import abilities, claims, figures, gallery, index, pages, replication, second_use
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.storage.files import AnyPath, path_of, write_atomically


def redraw(workdir: str | AnyPath, formats: Collection[str] = figures.FORMATS[:1]) -> None:
    """Reports every study that has records in `workdir`, and prints the findings.

    Args:
      formats: of figures and tables, see `figures.write`.

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
        said, images = pages.report(study, workdir, formats)
        print(said, end="\n\n")
        drawn.append((study, images))
    for said in abilities.write(studies, workdir, formats):
        print(said, end="\n\n")
    if said := second_use.write(studies, workdir):
        print(said, end="\n\n")
    listed = index.write(workdir)
    text = "\n".join([claims.page(studies), gallery.section(drawn, path_of(workdir))])
    write_atomically(page, text.encode())
    print(f"All reports: {listed}.html\nClaims and all figures: {page}")
    if refused:
        raise UserError("\n".join(refused))


def compare(workdir: AnyPath, other: AnyPath) -> None:
    """Prints where the findings of two directories of records agree.

    Raises:
      UserError: as in `redraw`, or as in `replication.page`.
    """
    (here, refused), (there, also_refused) = figures.read_studies(workdir), figures.read_studies(other)
    print(replication.page(here, there, (str(workdir), str(other))))
    if refused or also_refused:
        raise UserError("\n".join([*refused, *also_refused]))


def main() -> int:
    workdir, other = cli.directory("workdir", flags.FLAGS.workdir), flags.FLAGS.against
    if other is None:
        redraw(workdir, formats_of(flags.FLAGS.formats))
    else:
        compare(workdir, cli.directory("against", other))
    return 0


def formats_of(names: list[str]) -> list[str]:
    """Checks the value of --formats."""
    for name in names:
        if name not in figures.FORMATS:
            raise UserError(f"--formats: no format {name!r}; {did_you_mean(name, figures.FORMATS)}")
    return names


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "experiments", "directory of results/, reports/ and figures/")
    text = f"of {', '.join(figures.FORMATS)}: figures as SVG and PDF too, tables as LaTeX (booktabs) too"
    flags.DEFINE_list("formats", ["png"], text)
    flags.DEFINE_string("against", None, "another --workdir, made with other seeds: print where both agree")


if __name__ == "__main__":
    cli.run(main, define_flags=_define_flags)
