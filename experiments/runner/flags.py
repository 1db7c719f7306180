"""The flags that several commands share: which points a sweep does, and which questions a run is asked."""

from absl import flags

from experiments import cli
from experiments.runner import hosts
from experiments.runner.latencies import NamedTable, named
from experiments.runner.points import Point
from experiments.runner.questions import Questions
from experiments.runner.schemes import Quantizing, schemes_of
from experiments.runner.studies import points_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS
DEFAULT_STUDY = "configs/playground.py:tiny"

# What a launcher passes on to the sweeps that it starts, besides the flags of the config.
PASSED_ON = (
    *("workdir", "only", "arms", "seeds", "lines_every", "trials_per_program"),
    *("tasks", "data_dir", "limit", "quantize", "diagnose", "num_repeats", "sample"),
    *("calls", "instructions"),
)


def define_sweep() -> None:
    """Defines all flags of `experiments.sweep`; the launchers have them too."""
    flags.DEFINE_string("workdir", "runs", "directory of results/, figures/, reports/ and runs/")
    flags.DEFINE_bool("list", False, "print the points and what they cost here and elsewhere; train nothing")
    flags.DEFINE_bool(
        "status", False, "print what --workdir has, lacks and is at work on; train and change nothing"
    )
    flags.DEFINE_list(
        "only",
        [],
        'labels of the points to run, separated by commas, in " where they hold one; learning rates are '
        "fitted to these points alone; default: all",
    )
    flags.DEFINE_list(
        "arms", [], "parameterizations to run, such as completep; default: as the collection says, or all"
    )
    flags.DEFINE_integer("seeds", None, "number of seeds for each point; default: as the study says", 1)
    flags.DEFINE_integer(
        "jobs", None, "points that run side by side; default: one for each CPU core, 1 on an accelerator", 1
    )
    flags.DEFINE_float(
        "lines_every",
        60,
        "seconds between two lines about the steps of a point, where output is no terminal; 0: all lines",
        0,
    )
    flags.DEFINE_integer(
        "devices_per_run",
        None,
        "points run side by side, each on so many devices of this host (TPU: chips)",
        1,
    )
    flags.DEFINE_string(
        "trials_per_program",
        "auto",
        "runs of a point, of its first learning rates or of its seeds, that train in one program; auto: 1 on "
        "CPUs and on several devices, else as many as fit into memory",
    )
    flags.DEFINE_string(
        "shard",
        "0/1",
        "i/n: only every n-th point, from the i-th on; i from 0 to n - 1. It tunes these, helps to tune the "
        "others of their studies, as learning rates are fitted together, and then compares its own",
    )
    flags.DEFINE_list(
        "quantize", [], "schemes that every finished run is quantized to, such as w8a8,w4:32; default: none"
    )
    flags.DEFINE_bool("diagnose", False, "say of every finished run what its layers do")
    flags.DEFINE_multi_string(
        "sample", [], "a text that the first run of every design continues, for the report; may be repeated"
    )
    define_loops()
    define_speaking()
    hosts.define_flags()
    define_scoring()


def define_loops() -> None:
    """Defines the flag for other numbers of loops than in training."""
    flags.DEFINE_list(
        "num_repeats", [], "numbers of loops to score with, such as 1,2,4; default: that of training alone"
    )


def define_speaking() -> None:
    """Defines the flags of API calls and instructions."""
    flags.DEFINE_list(
        "calls",
        [],
        "API calls to ask for: combinations, values, wordings, conversations:<glob>; with :<number> so many "
        "conversations",
    )
    flags.DEFINE_list(
        "instructions", [], "rules to follow: all, or names; the last with :<number> of prompts"
    )


def define_latency() -> None:
    """Defines the flag that names a table of latency."""
    flags.DEFINE_string("latency", None, "table of experiments.latency, <file>[:<type of weights>]")


def asked_latency() -> NamedTable | None:
    """The table that --latency names; None without it, UserError if it cannot be read."""
    return named(FLAGS.latency) if FLAGS.latency else None


def define_scoring() -> None:
    """Defines the flags of zero-shot tasks."""
    flags.DEFINE_list("tasks", [], "tasks or groups of lm-eval, or mobilellm, separated by commas")
    flags.DEFINE_string("data_dir", None, "folder with local files of --tasks; default: the hub")
    flags.DEFINE_integer("limit", None, "largest number of questions of each of --tasks; default: all", 1)


def refuse_listing() -> None:
    """UserError where --list or --status is given to a launcher, which starts what `sweep` would do."""
    for name in ("list", "status"):
        if FLAGS[name].present:
            raise UserError(f"--{name}: leave it out; python -m experiments.sweep --{name} prints it")


def asked_points() -> list[Point]:
    """The points that the flags choose, of all shards; errors as in `points_of`."""
    return points_of(cli.config_spec(), cli.overrides(), FLAGS.seeds, FLAGS.only, FLAGS.arms)


def asked_schemes() -> Quantizing | None:
    """What --quantize asks for; None without it, UserError if it names an unknown scheme."""
    return Quantizing(schemes_of("quantize", FLAGS.quantize)) if FLAGS.quantize else None


def asked_trials() -> int | None:
    """The number that --trials_per_program gives, None for auto; UserError if it is neither."""
    value = FLAGS.trials_per_program
    if value != "auto" and not (value.isdecimal() and int(value)):
        raise UserError(f"--trials_per_program={value}: expected auto, or a number of at least 1")
    return None if value == "auto" else int(value)


def asked_loops() -> tuple[int, ...]:
    """The numbers of loops that --num_repeats names; UserError if one is no number."""
    words = FLAGS.num_repeats
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise UserError(
                f"--num_repeats={','.join(words)}: {word!r} is not valid; expected numbers such as 1,2,4"
            )
    return tuple(sorted({int(word) for word in words}))


def asked_questions(bos: bool | None = None) -> Questions | None:
    """The questions that the flags choose; None without --tasks.

    Raises:
      UserError: another flag of --tasks is given without it.
    """
    if FLAGS.tasks:
        folder = None if FLAGS.data_dir is None else local_directory("data_dir", FLAGS.data_dir)
        return Questions(tuple(FLAGS.tasks), folder, FLAGS.limit, bos)
    for flag, value in (("data_dir", FLAGS.data_dir), ("limit", FLAGS.limit), ("bos", bos)):
        if value is not None:
            raise UserError(f"--{flag}={value}: needs --tasks, such as --tasks=mobilellm")
    return None
