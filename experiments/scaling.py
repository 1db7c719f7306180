"""The law of size, aspect ratio, repeats and horizon, from the records of a study of shape, without jax.

  python -m experiments.sweep --config=configs/shape_laws.py:laptop --workdir=runs/laws
  python -m experiments.scaling --workdir=runs/laws

Takes the records of all presets of the study, as far as there are any: what they cannot determine is left
out, and said. Writes figures/<study>-*.png and reports/<study>.md and .html.
"""

from absl import flags

from experiments import cli
from experiments.reporting import figures, index, shape_figures, shape_page
from experiments.reporting.pages import write_page
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.analysis.shape_findings import findings_of
from mobilellm_jax.analysis.shape_fit import RESAMPLES
from mobilellm_jax.analysis.study import file_stem
from mobilellm_jax.errors import UserError


def main() -> int:
    """Fits, draws and prints what is in --workdir, and returns the exit status."""
    workdir, study = cli.directory("workdir", flags.FLAGS.workdir), flags.FLAGS.study
    wanted = flags.FLAGS.presets
    found = [record for record in read_records(workdir / "results") if record.study == study]
    there = {record.preset for record in found}
    absent = [preset for preset in wanted if preset not in there]
    if not found or absent:
        preset = f":{absent[0]}" if found else ""
        raise UserError(
            f"{workdir}/results: no records of {study}{preset}; make them with: "
            f"python -m experiments.sweep --config=configs/{study}.py{preset} --workdir={workdir}"
        )
    taken = [record for record in found if not wanted or record.preset in wanted]
    findings = findings_of(taken, resamples=flags.FLAGS.resamples, planned=wanted or _cells(study))
    stem = file_stem(study)
    images = [
        figures.save(f"{stem}-{suffix}", alt, figure, workdir)
        for suffix, alt, figure in shape_figures.images(findings)
        if figure is not None
    ]
    path = write_page(stem, shape_page.TITLE, shape_page.sections(findings, images), workdir)
    index.write(workdir)
    print(shape_page.text(findings))
    print(f"Report: {path}.md")
    return 0


def _cells(study: str) -> list[str]:
    """The presets that the study's config lists as CELLS; [] where it lists none, or has no file."""
    path = f"configs/{study}.py"
    return list(getattr(cli.load_config(path)[0], "CELLS", [])) if (cli.ROOT / path).is_file() else []


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "experiments", "directory of results/, reports/ and figures/")
    flags.DEFINE_string("study", "shape_laws", "the study whose presets are sizes and horizons")
    flags.DEFINE_list("presets", [], "its presets to take; all, if not given")
    flags.DEFINE_integer("resamples", RESAMPLES, "bootstrap samples of each fit", lower_bound=2)


if __name__ == "__main__":
    cli.run(main, define_flags=_define_flags)
