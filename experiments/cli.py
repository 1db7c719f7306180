"""What all commands share: config files and their overrides, one-line errors, exit statuses.

Exit statuses: 0 done; 1 some run failed or diverged; 2 bad input; 75 stopped by SIGTERM or SIGHUP, and 130 by
Ctrl-C, where the same command goes on: after 75 (`signals.RESUME_ME`) a scheduler should start it again.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mobilellm_jax.errors import Interrupted, UserError, did_you_mean
from mobilellm_jax.storage import quiet
from mobilellm_jax.storage.files import AnyPath, is_bucket, path_of, reason
from mobilellm_jax.training import signals
from mobilellm_jax.training.malloc import keep_freed_memory

ROOT = Path(__file__).parents[1]
_PATIENCE_S = 3.0  # before a command says what it waits for


def _here(spec: str) -> str:
    """The spec of a config, with the path of the file in this checkout if there is none in the folder."""
    path, colon, preset = spec.partition(":")
    is_ours = not Path(path).is_file() and (ROOT / path).is_file()
    return f"{ROOT / path}{colon}{preset}" if is_ours else spec


def load_config(spec: str) -> tuple[ModuleType, str, ConfigDict]:
    """The module, preset and config of "configs/<file>.py:<preset>" (no preset: the file's first).

    A path that leads to no file from the current folder is taken from this checkout.

    Raises:
      UserError: there is no such file, it is no config, or it has no such preset.
    """
    path, _, preset = _here(spec).partition(":")
    if not Path(path).is_file():
        there = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/[!_]*.py"))
        raise UserError(f"--config={spec}: there is no file {path}; {did_you_mean(path, there)}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None:
        raise UserError(f"--config={spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    with explained(spec, path):
        # exec_module may take code that was compiled from another text of the same size and second.
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {path} has no get_config(preset); it is not a config file")
    with explained(spec, path):
        config = module.get_config(*[preset] if preset else [])
    return module, preset or getattr(module, "PRESETS", [""])[0], config


@contextlib.contextmanager
def explained(spec: str, path: str) -> Iterator[None]:
    """Turns an error in the config file at `path` into one line that names the place."""
    try:
        yield
    except ValueError as error:  # what a config raises on purpose
        raise UserError(f"--config={spec}: {error}") from None
    except Exception as error:
        file = Path(path).resolve()
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        message = re.sub(r' Other fields present: "\{.*\}"', "", message)  # ml_collections prints all values
        why = f"{type(error).__name__}: {' '.join(message.split())}"
        raise UserError(f"--config={spec}: {path}{f', line {line}' if line else ''}: {why}") from None


def config_spec() -> str:
    """The value of `--config`."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def one_config() -> ConfigDict:
    """The config of `--config` with its overrides, for a command about one model.

    Raises:
      UserError: the file names several studies, whose configs are in files of their own.
    """
    module, preset, _ = load_config(config_spec())
    if members := module.studies(preset) if hasattr(module, "studies") else []:
        raise UserError(
            f"--config={config_spec()}: names {len(members)} studies, and this command takes one config; use "
            f"{' or '.join(f'--config={member}' for member in members)}, or run them all with "
            f"python -m experiments.sweep --config={config_spec()}"
        )
    return flags.FLAGS.config


def overrides() -> dict[str, Any]:
    """The `--config.<field>=<value>` flags of the command line as {"model.width": 64, ...}."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def given(*names: str) -> list[str]:
    """`--config`, its overrides and the flags of these names that were given, for another command."""
    names = ("config", *sorted(name for name in flags.FLAGS if name.startswith("config.")), *names)
    return [flags.FLAGS[name].serialize() for name in names if flags.FLAGS[name].present]


def command() -> str:
    """The command line, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    arguments = [spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(["python", "-m", *arguments])


def config_first(argv: Sequence[str], default_config: str) -> list[str]:
    """The command line with `--config` in front, which its overrides have to follow.

    Raises:
      UserError: the config cannot be loaded, or an override names a field that it does not have.
    """
    rest, spec = list(argv[1:]), default_config
    for i, argument in enumerate(rest):
        if argument in ("--config", "-config") and i + 1 < len(rest):
            spec = rest[i + 1]
            del rest[i : i + 2]
            break
        if argument.startswith(("--config=", "-config=")):
            spec = argument.partition("=")[2]
            del rest[i]
            break
    config = load_config(spec)[2]
    for argument in rest:
        name = argument.lstrip("-").partition("=")[0].removeprefix("no")
        if argument.startswith("-") and name.startswith("config."):
            check_field(config, name.removeprefix("config."), "--config.")
    return [argv[0], f"--config={_here(spec)}", *rest]


def directory(flag: str, name: str) -> AnyPath:
    """The path that a flag names, ~ is home; a bucket has to be there.

    Raises:
      UserError: the path is an address, but not gs://bucket/folder; gcsfs is not installed; or the bucket
        does not exist or cannot be read.
    """
    path = path_of(os.path.expanduser(name))
    if not is_bucket(path):
        return path
    bucket, _, folder = name.removeprefix("gs://").partition("/")
    if not name.startswith("gs://") or not bucket or not folder.strip("/"):
        raise UserError(f"--{flag}={name}: expected a local directory, or gs://bucket/folder")
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"--{flag}={name}: buckets need gcsfs: python -m pip install -e '.[gcs]'")
    waiting = f"waiting for bucket {bucket}; without a network, this gives up after a minute or two"
    try:
        with _said_after(_PATIENCE_S, waiting):
            there = path_of(f"gs://{bucket}").exists()
    except Exception as error:  # of credentials, of the network, of gcsfs: they have no type in common
        raise UserError(f"--{flag}={name}: cannot read the bucket: {reason(error)}") from None
    if not there:
        raise UserError(f"--{flag}={name}: bucket {bucket} does not exist, or you may not read it")
    return path


@contextlib.contextmanager
def _said_after(seconds: float, text: str) -> Iterator[None]:
    """Prints a line to stderr where what it wraps takes longer."""
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_field(config: ConfigDict, name: str, prefix: str = "") -> None:
    """Checks that a dotted name, shown behind `prefix`, is that of a field; UserError if it is not."""
    group: Any = config
    for part in name.split("."):
        known = list(group) if isinstance(group, ConfigDict) else []
        if part not in known:
            hint = did_you_mean(part, known) if known else "the field before it holds a value, not a group"
            raise UserError(f"{prefix}{name}: there is no field {part!r}; {hint}")
        group = group[part]


def _fields(config: Any) -> str:
    """All fields of a config with their values, as flags."""
    lines = [
        f"\nfields of {config_spec()}, of which the points of a study change some; "
        "docs/reference/configuration.md says what they mean:"
    ]
    for group, values in config.items():
        lines += [f"  --config.{group}.{name}={value}" for name, value in values.items()]
    return "\n".join(lines)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        said = str(error).splitlines()[0]
        # What int("1e3") raises.
        said = re.sub(
            r"invalid literal for int\(\) with base \d+: (.*)", r"\1 is not a whole number in digits", said
        )
        raise UserError(said) from None
    except SystemExit:  # absl has printed what --help asks for, and would end with 1
        if "config" in flags.FLAGS:
            print(_fields(flags.FLAGS["config"].value))
        sys.exit(0)
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; options are written --name=value")
    return rest


def run(
    main: Callable[[], int], default_config: str = "", define_flags: Callable[[], object] = lambda: None
) -> None:
    """Calls `define_flags`, parses the flags, calls `main` and exits with the status it returns.

    A command with a `default_config` gets `--config` and `--config.<field>=<value>`. Errors that a person
    can mend, and interruptions, become one line on stderr.
    """
    keep_freed_memory()
    quiet.settings()
    signals.watch()
    try:
        sys.argv = ["--help" if argument == "-h" else argument for argument in sys.argv]
        before = set(flags.FLAGS)
        define_flags()
        if default_config:
            # The flag below reads sys.argv by itself, and fails with a traceback where this does not.
            sys.argv = config_first(sys.argv, default_config)
            text = "config file, with :preset; its fields are set by --config.<group>.<field>=<value>"
            config_flags.DEFINE_config_file("config", default_config, text, lock_config=True)
        for name in set(flags.FLAGS) - before:  # --help shows them, wherever they are defined
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
        app.run(lambda _: main(), flags_parser=_parse)
    except UserError as error:
        sys.exit(_complain(f"error: {error}", 2))
    except (AssertionError, RuntimeError) as error:
        sys.exit(_complain(f"error: {_no_devices(error)}", 2))
    except Interrupted as stop:  # by what noted the signal
        sys.exit(_complain(f"{stop}. {signals.AGAIN}", signals.exit_status(stop)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second error at exit


def _no_devices(error: Exception) -> str:
    """The message where JAX finds no device of the platforms asked for; raises any other error."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if not asked or not where.endswith("xla_bridge.py"):
        raise error
    return (
        f"JAX_PLATFORMS={asked}: JAX finds no such device; unset JAX_PLATFORMS, or install its support "
        "(GPU: pip install -e '.[cuda]', TPU: pip install -e '.[tpu]')"
    )


def _complain(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
