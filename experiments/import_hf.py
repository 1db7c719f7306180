"""Import a Llama from Hugging Face: MobileLLM, SmolLM, TinyLlama, ... become a run directory.

  python -m experiments.import_hf --source=HuggingFaceTB/SmolLM2-135M --workdir=runs/smollm2
  python -m experiments.import_hf --source=exported --workdir=runs/back --sharing=immediate --num_repeats=2

The source is a folder with config.json and safetensors, or an id on the hub, which is downloaded. With
--sharing, layers that are copies of each other are folded into blocks again; it is checked that they are.
"""

import re
from pathlib import Path

from absl import flags
from huggingface_hub import snapshot_download

from configs import base
from experiments import cli
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import huggingface
from mobilellm_jax.formats.huggingface_config import model_fields, read_object
from mobilellm_jax.runs.directory import TOKENIZER
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("source", None, "folder with config.json and safetensors, or <owner>/<name>")
    flags.DEFINE_string("workdir", None, "run directory to make")
    flags.DEFINE_string("sharing", "", "fold copied layers: a sharing strategy or explicit plan")
    flags.DEFINE_integer("num_repeats", 1, "copies of each block, with a strategy", 1)


def main() -> int:
    """Imports, and returns the exit status."""
    if not FLAGS.source:
        raise UserError("--source: missing; name a folder, or a hub id such as HuggingFaceTB/SmolLM2-135M")
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name the directory to make, such as --workdir=runs/smollm2")
    how = (FLAGS.sharing, FLAGS.num_repeats)
    folder = fetch(FLAGS.source, how)
    workdir = local_directory("workdir", FLAGS.workdir)
    config = huggingface.import_run(folder, workdir, base.get_config(), *how)
    m, has_tokenizer = config.model, (workdir / TOKENIZER).exists()
    print(
        f"imported {accounting.parameters(m).total:,} parameters, {m.depth} blocks of width {m.width} in "
        f"{m.effective_depth} layers; tokenizer: {config.data.tokenizer if has_tokenizer else 'none'}; "
        f"see {FLAGS.workdir}"
    )
    return 0


def fetch(source: str, how: tuple[str, int]) -> Path:
    """The folder that `source` names; downloads it if it is an id on the hub.

    Raises:
      UserError: it is neither there nor on the hub, or its config.json, which comes first, is not supported.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"--source={source}: no such folder, and not a hub id (<owner>/<name>)")
    try:
        config_folder = snapshot_download(source, allow_patterns=["config.json"])
        model_fields(read_object(Path(config_folder) / "config.json"), *how)
        return Path(snapshot_download(source, allow_patterns=list(huggingface.FILES)))
    except UserError:
        raise
    except Exception as error:  # the library lets those of several others through
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"--source={source}: no such folder, and the hub answered: {reason}") from None


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
