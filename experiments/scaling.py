"""Loss against parameters for the shallowest and the deepest models, and where the two would cross.

  python -m experiments.sweep --config=configs/depth_scaling.py:laptop --workdir=runs/scaling
  python -m experiments.scaling --workdir=runs/scaling

Takes the records of all presets of a study that trained on the same data; presets of equal length make one
fit. Writes figures/<study>-scaling.png and reports/<study>-scaling.md.
"""

from absl import flags

from experiments import cli
from experiments.reporting import drawing
from experiments.reporting.scaling_page import check_same_data, draw, report, size
from mobilellm_jax.analysis.records import by_study, read_records
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import write_atomically


def main() -> int:
    """Fits, draws and prints what is in --workdir, and returns the exit status."""
    workdir, study = cli.directory("workdir", flags.FLAGS.workdir), flags.FLAGS.study
    presets = {
        preset: records
        for (name, preset), records in by_study(read_records(workdir / "results")).items()
        if name == study and preset in flags.FLAGS.presets
    }
    if not flags.FLAGS.presets:
        raise UserError("--presets: name the presets to take, separated by commas")
    if missing := [preset for preset in flags.FLAGS.presets if preset not in presets]:
        raise UserError(
            f"{workdir}/results: no records of {study}:{missing[0]}; make them with: "
            f"python -m experiments.sweep --config=configs/{study}.py:{missing[0]} --workdir={workdir}"
        )
    sizes = sorted(
        (size(study_of(records)) for records in presets.values()), key=lambda s: (s.steps, s.parameters)
    )
    check_same_data(sizes)
    text = report(sizes, f"{study}-scaling.png")
    write_atomically(workdir / "figures" / f"{study}-scaling.png", drawing.render(draw(sizes)))
    write_atomically(workdir / "reports" / f"{study}-scaling.md", text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "experiments", "directory of results/, reports/ and figures/")
    flags.DEFINE_string("study", "depth_vs_width", "the study whose presets differ in size")
    flags.DEFINE_list(
        "presets", ["laptop_37k", "laptop_110k", "laptop_330k", "laptop_110k_long"], "its presets to take"
    )
    cli.run(main)
