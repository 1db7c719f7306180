"""Export a run, trained or imported, to a folder that transformers loads without remote code.

  python -m experiments.export_hf --workdir=runs/first --target=exported
  python -m experiments.export_hf --workdir=runs/first --target=exported_bf16 --dtype=bfloat16
  python -c 'import transformers; transformers.AutoModelForCausalLM.from_pretrained("exported")'

A shared block is written out once for each time it is applied: the result is a plain Llama of that many
layers. `experiments.import_hf` takes it back, bit for bit in float32.
"""

from absl import flags

from experiments import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import huggingface
from mobilellm_jax.formats.huggingface_weights import DTYPES, WEIGHTS
from mobilellm_jax.runs.directory import open_tokenizer
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string("target", None, "folder to make")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "of the weights")


def main() -> int:
    """Exports, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name the run to export, such as --workdir=runs/first")
    if not FLAGS.target:
        raise UserError("--target: missing; name the folder to make, such as --target=exported")
    workdir, target = local_directory("workdir", FLAGS.workdir), local_directory("target", FLAGS.target)
    config = huggingface.export_run(workdir, target, FLAGS.dtype)
    tokenizer = open_tokenizer(workdir)
    print(
        f"exported {config.model.effective_depth} layers in {FLAGS.dtype}, "
        f"{(target / WEIGHTS).stat().st_size / 1e6:.1f} MB; "
        f"tokenizer: {tokenizer.spec if tokenizer else 'the run keeps none'}; see {target}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
