"""Train one model.

  python -m experiments.train --config=configs/base.py --workdir=runs/first
  python -m experiments.train --config=configs/mobilellm.py:125m --config.train.steps=1000 --workdir=runs/125m
  python -m experiments.train --distributed --workdir=/shared/runs/first     # on every host
  python -m experiments.train --config=configs/mobilellm.py:125m --workdir=runs/125m --dry_run
  python -m experiments.train --config=configs/finetune.py:runs/first --workdir=runs/more

The same command again resumes from the newest intact checkpoint; once finished, it prints the result. More
steps for a finished run, and other data, are a new run that starts from it, see docs/howto/finetuning.md.
SIGTERM and SIGHUP save a checkpoint and exit with status 75, which asks a scheduler to start the command
again.
"""

import contextlib
import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from experiments import cli
from experiments.runner import hosts
from experiments.runner.leases import Leases
from mobilellm_jax.analysis.records import Record, write_record
from mobilellm_jax.config import Config, ModelConfig, from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import adapted
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs import provenance
from mobilellm_jax.runs.directory import check_workdir
from mobilellm_jax.runs.lineage import check_apart, open_parent
from mobilellm_jax.runs.run import agreed_record, check, enable_compilation_cache, run
from mobilellm_jax.runs.teacher import Teacher, open_teacher
from mobilellm_jax.storage.files import AnyPath, reason

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run; made if it is not there")
    flags.DEFINE_bool(
        "dry_run",
        False,
        "check the config and what is in --workdir, print what the run is, and read, write and train nothing",
    )
    hosts.define_flags()


def main() -> int:
    """Trains, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name the directory of the run, such as --workdir=runs/first")
    config = from_config_dict(cli.one_config())
    hosts.start()
    config = with_dtype(config, jax.default_backend)
    workdir = cli.directory("workdir", FLAGS.workdir)
    study, _, preset = cli.config_spec().partition(":")
    describe = functools.partial(
        Record,
        study=Path(study).stem,
        preset=preset,
        point=workdir.name,
        point_index=0,
        seed=config.train.init_seed,
        phase="comparison",
        question=f"What loss does {cli.config_spec()} reach?",
        matched="total_parameters",
        scientific=[],
        nuisance=[],
        tuning="none",
        metric="loss",
        pairs=[],
        margin=0.0,
        x=None,
        overrides=cli.overrides(),
        command=cli.command(),
        git_commit=provenance.git_commit(),
    )
    path = workdir / "record.json"
    check_apart(config, workdir)
    record = agreed_record(path, config)
    if FLAGS.dry_run:
        lines = [*_described(config, workdir, record), "dry run: nothing was trained"]
        processes.of_first(lambda: print("\n".join(lines)))
        return 0
    if record is None:
        enable_compilation_cache()
        with _alone(workdir):
            record = agreed_record(path, config)  # another may have finished it just now
            if record is None:
                lines = _described(config, workdir, record)
                processes.of_first(lambda: print("\n".join(lines), flush=True))
                record = run(config, workdir, describe)
                processes.of_first(lambda: write_record(record, path))
    if record.status != "finished":
        print(f"{record.status}: {record.error}; see {path}")
        return 1
    bits = record.final and record.final["bits_per_byte"]
    in_bits = f", {bits:.4f} bits per byte" if bits else ""
    print(f"finished: held-out loss {record.score:.4f} nats per token{in_bits}; see {path}")
    return 0


def _described(config: Config, workdir: AnyPath, record: Record | None) -> list[str]:
    """What the run is, line by line: shape, length, data, devices and directory.

    Raises:
      UserError: the devices do not fit the config, the directory holds another run, or the parent or the
        teacher does not fit.
    """
    mesh, model, train, data = check(config), config.model, config.train, config.data
    check_workdir(workdir, config)
    parent, teacher = open_parent(config, workdir), open_teacher(config, workdir, mesh)
    taught_by = teacher and teacher.distillation.model
    counts, device = accounting.parameters(model), provenance.device()
    trained = accounting.adapters(adapted(config))
    tokens = train.steps * train.batch_size * data.sequence_length
    flops = tokens * accounting.run_budgets(config, taught_by)["train_flops_per_token"]
    loops = f"; {train.loops} loops, drawn at each step" if train.loops else ""
    text_of_python = f" (the text of Python {platform.python_version()})" * (data.source == "bundled")
    begun = any(workdir.glob("checkpoints/*"))
    state = "finished" if record else "to be resumed from its newest checkpoint" if begun else "new"
    rows = {
        "model": f"{model.depth} blocks, {model.effective_depth} layers, width {model.width}; "
        f"{counts.total:,} parameters, {counts.non_embedding:,} of them outside the embedding"
        + f"; trained are {trained:,} in adapters of rank {train.lora_rank}"
        * bool(trained),
        "parent": f"{parent}" + ", with its optimizer" * train.resume_optimizer if parent else "",
        "teacher": _taught(teacher, model, data.sequence_length) if teacher else "",
        "training": f"{train.steps:,} steps of {train.batch_size:,} rows of {data.sequence_length:,} tokens; "
        f"{tokens:,} tokens, {flops:.3g} FLOPs{loops}",
        "data": f"{data.source}{text_of_python}, tokenizer {data.tokenizer}",
        "devices": f"{device['count']} x {device['kind']} ({device['platform']}), "
        f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}",
        "workdir": f"{workdir} ({state})",
    }
    return [f"{name:10}{text}" for name, text in rows.items() if text]


def _taught(teacher: Teacher, model: ModelConfig, length: int) -> str:
    """The teacher of a run, and what it adds to the work of a step."""
    there, flops = teacher.distillation.model, accounting.train_flops_per_token
    more = flops(model, length, there) / flops(model, length)
    size = accounting.parameters(there).total
    return f"{teacher}; {size:,} parameters; a step takes {more:.2f} times the FLOPs of one without it"


@contextlib.contextmanager
def _alone(workdir: AnyPath) -> Iterator[None]:
    """Keeps all others out of `workdir`; process 0 does so for all of a run.

    Raises:
      UserError: in all processes, if another training is at work there.
    """
    mine: list[Leases] = []

    def take() -> None:
        try:
            leases = Leases(workdir / ".leases")
        except Exception as error:  # a bucket has other ones than OSError
            raise UserError(f"--workdir={workdir}: cannot write there ({reason(error)})") from None
        worker = leases.take_unless_alive("run")
        if worker:
            raise UserError(
                f"--workdir={workdir}: another training is running there: {worker} (host, process id); "
                "wait for it, or use another --workdir"
            )
        mine.append(leases)

    processes.of_first(take)
    try:
        yield
    finally:
        for leases in mine:
            leases.release("run")


if __name__ == "__main__":
    cli.run(main, default_config="configs/base.py", define_flags=define_flags)
