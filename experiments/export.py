"""Export a run, trained or imported: to a folder that transformers loads, or to a file for llama.cpp.

  python -m experiments.export --workdir=runs/first --out=exported
  python -c 'import transformers; transformers.AutoModelForCausalLM.from_pretrained("exported")'
  python -m experiments.export --workdir=runs/first --format=gguf --type=q8_0 --out=first.gguf
  llama-cli --model first.gguf --prompt 'The list'

Both are a plain Llama, which has no layer sharing: a shared block is written out once for each time it is
applied. `experiments.import_hf` takes a folder back, bit for bit in float32. Of a GGUF file, the logits and
token ids of llama.cpp are compared with those of the run before it gets its name.
"""

import sys
from pathlib import Path

from absl import flags

from experiments import cli
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import gguf, huggingface, llama_cpp
from mobilellm_jax.formats.gguf_parity import ParityError
from mobilellm_jax.formats.huggingface_weights import DTYPES, WEIGHTS
from mobilellm_jax.runs.directory import open_tokenizer
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS
FORMATS = ("hf", "gguf")


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_enum("format", "hf", FORMATS, "a folder of Hugging Face, or a file of llama.cpp")
    flags.DEFINE_string("out", None, "folder or file to make")
    flags.DEFINE_enum("type", "f32", gguf.TYPES, "of the weights; a folder takes the first three")
    flags.DEFINE_bool("mixed", False, "keep tensors in f16 whose rows do not fit q8_0 or q4_0")


def main() -> int:
    """Exports, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name the run to export, such as --workdir=runs/first")
    if not FLAGS.out:
        example = "first.gguf" if FLAGS.format == "gguf" else "exported"
        raise UserError(f"--out: missing; name what to make, such as --out={example}")
    workdir, out = local_directory("workdir", FLAGS.workdir), local_directory("out", FLAGS.out)
    return _to_gguf(workdir, out) if FLAGS.format == "gguf" else _to_folder(workdir, out)


def _to_folder(workdir: Path, out: Path) -> int:
    if FLAGS.type not in DTYPES:
        raise UserError(
            f"--type={FLAGS.type}: a Hugging Face folder holds {', '.join(DTYPES)}; use one of these, or "
            "--format=gguf"
        )
    config = huggingface.export_run(workdir, out, DTYPES[FLAGS.type])
    _say(config.model, out / WEIGHTS, open_tokenizer(workdir), out)
    return 0


def _to_gguf(workdir: Path, out: Path) -> int:
    try:
        done = gguf.export_run(workdir, out, FLAGS.type, FLAGS.mixed)
    except ParityError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return 1
    _say(done.config.model, out, done.tokenizer, out)
    others = [name for name, kind in done.kinds.items() if kind not in ("f32", FLAGS.type)]
    if others:
        print(f"in f16, as {FLAGS.type} does not fit their rows: {len(others)} tensors ({others[0]}, ...)")
    found = done.parity
    if found is None:
        print(f"parity: not checked, as llama.cpp is not installed ({llama_cpp.INSTALL})")
        return 0
    rounding = f"; {FLAGS.type} itself changes them by {found.rounding:.1e}" if found.rounding else ""
    print(
        f"parity: logits of llama.cpp within {found.difference:.1e} of the largest (at most "
        f"{found.bound:.0e}), the same most probable token at {found.agreeing} of {found.positions} "
        f"positions{rounding}"
    )
    if found.texts:
        print(f"parity: the same token ids in {found.texts} of {found.texts} texts")
    return 0


def _say(m: ModelConfig, weights: Path, tokenizer: Tokenizer | None, out: Path) -> None:
    print(
        f"exported {m.effective_depth} layers in {FLAGS.type}, {weights.stat().st_size / 1e6:.1f} MB; "
        f"tokenizer: {tokenizer.spec if tokenizer else 'the run keeps none'}; see {out}"
    )
    if m.effective_depth > m.depth:
        print(
            f"{m.depth} shared blocks were written out as {m.effective_depth} layers: a plain Llama cannot "
            "share them"
        )


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
