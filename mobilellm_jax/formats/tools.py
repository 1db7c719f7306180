"""What the drivers of other libraries' converters have in common: the extra, the folder, the process."""

import dataclasses
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from mobilellm_jax import model
from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import huggingface_config
from mobilellm_jax.formats.huggingface import write_folder
from mobilellm_jax.formats.huggingface_weights import check_values, tensors
from mobilellm_jax.formats.parity import Parity
from mobilellm_jax.model.uses import as_blocks
from mobilellm_jax.runs.directory import open_tokenizer
from mobilellm_jax.runs.opening import open_run

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Exported(NamedTuple):
    """What was written, and how near it is to the run."""

    config: Config
    tokenizer: Tokenizer
    parity: Parity


class Run(NamedTuple):
    """A run that can become a folder of Hugging Face.

    Attributes:
      workdir: the run.
      original: its config.
      config: with blocks alone, as `as_blocks` leaves it.
      params: of `config`.
      tokenizer: the run's.
    """

    workdir: Path
    original: Config
    config: Config
    params: model.Params
    tokenizer: Tokenizer

    def write_folder(self, folder: Path) -> None:
        """Makes the folder, in float32."""
        folder.mkdir()
        write_folder(folder, self.workdir, self.config, self.params, "float32")


def require(name: str, *packages: str) -> None:
    """Raises UserError with the install line if a package of the extra `name` is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"--format={name}: needs {', '.join(missing)}; install with {install_line(name)}")


def install_line(name: str) -> str:
    """The command that installs an extra."""
    return f"python -m pip install -e '.[{name}]'"


def open_exportable(workdir: Path, name: str) -> Run:
    """Opens a run for the format `name`.

    Raises:
      UserError: there is no intact run, it is not a Llama, it keeps no tokenizer, or weights are NaN or 0.
    """
    config, params = open_run(workdir)
    huggingface_config.check_exportable(config.model)
    tokenizer = open_tokenizer(workdir)
    if tokenizer is None:
        raise UserError(
            f"--format={name}: the run keeps no tokenizer, and the converter wants one; train with one, or "
            "use --format=gguf"
        )
    params, m = as_blocks(params, config.model, f"--format={name}")
    for tensor_name, tensor in tensors(params, m):
        check_values(tensor_name, tensor)
    return Run(workdir, config, dataclasses.replace(config, model=m), params, tokenizer)


def check_sizes(name: str, config: ModelConfig, sizes: dict[str, int], reason: str) -> None:
    """Raises UserError if a size of the model, by field, equals the vocabulary."""
    equal = [f"{field}" for field, size in sizes.items() if size == config.vocab_size]
    if equal:
        raise UserError(
            f"--format={name}: {' and '.join(equal)} equals model.vocab_size={config.vocab_size}, {reason}; "
            "use another size, or --format=gguf"
        )


def convert(name: str, cwd: Path, *arguments: str) -> None:
    """Runs `python arguments` in a folder, without access to the hub.

    Raises:
      UserError: it fails; the message is the last line that it printed.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **_OFFLINE},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        last = said[-1] if said else "it printed nothing"
        raise UserError(f"--format={name}: the converter ended with status {done.returncode}: {last}")
