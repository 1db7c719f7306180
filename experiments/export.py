"""Export a run, trained or imported: for transformers, llama.cpp, ONNX Runtime, ExecuTorch or LiteRT.

  python -m experiments.export --workdir=runs/first --out=exported
  python -c 'import transformers; transformers.AutoModelForCausalLM.from_pretrained("exported")'
  python -m experiments.export --workdir=runs/first --format=gguf --type=q8_0 --out=first.gguf
  llama-cli --model first.gguf --prompt 'The list'
  python -m experiments.export --workdir=runs/first --format=onnx --type=int4 --out=first-onnx
  python -m experiments.export --workdir=runs/first --format=executorch --out=first-executorch
  python -m experiments.export --workdir=runs/first --format=litert --out=first.litertlm

All are a plain Llama, which has no layer sharing: a shared block is a layer for each time it is applied. Its
weights are written out as often, but stored once in ONNX and ExecuTorch. `experiments.import_hf` takes a
folder back, bit for bit in float32. Other formats are run by their own library before they get their name,
and the logits compared with those of the run.
"""

import sys
from pathlib import Path

from absl import flags

from experiments import cli
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import executorch, gguf, huggingface, litert, llama_cpp, onnx
from mobilellm_jax.formats.huggingface_weights import DTYPES, WEIGHTS
from mobilellm_jax.formats.parity import Parity, ParityError
from mobilellm_jax.runs.directory import open_tokenizer
from mobilellm_jax.storage.files import local_directory

FLAGS = flags.FLAGS
_TYPES = {
    "hf": tuple(DTYPES),
    "gguf": gguf.TYPES,
    "onnx": tuple(onnx.TYPES),
    "executorch": executorch.TYPES,
    "litert": litert.TYPES,
}
_OUT = {
    "hf": "exported",
    "gguf": "first.gguf",
    "onnx": "first-onnx",
    "executorch": "first-executorch",
    "litert": "first.litertlm",
}
_BLOCKS = {"onnx", "executorch"}  # that store equal weights once
_DRIVERS = {"onnx": onnx, "executorch": executorch, "litert": litert}


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_enum("format", "hf", list(_TYPES), "a folder of Hugging Face, or what another library runs")
    flags.DEFINE_string("out", None, "folder or file to make")
    kinds = list(dict.fromkeys(kind for of in _TYPES.values() for kind in of))
    flags.DEFINE_enum("type", "f32", kinds, "of the weights; the formats take different ones")
    flags.DEFINE_bool("mixed", False, "of gguf: keep tensors in f16 whose rows do not fit q8_0 or q4_0")


def main() -> int:
    """Exports, and returns the exit status."""
    if not FLAGS.workdir:
        raise UserError("--workdir: missing; name the run to export, such as --workdir=runs/first")
    if not FLAGS.out:
        raise UserError(f"--out: missing; name what to make, such as --out={_OUT[FLAGS.format]}")
    if FLAGS.type not in _TYPES[FLAGS.format]:
        holding = [name for name, of in _TYPES.items() if FLAGS.type in of]
        raise UserError(
            f"--type={FLAGS.type}: --format={FLAGS.format} holds {', '.join(_TYPES[FLAGS.format])}; use one "
            f"of these, or --format={' or '.join(holding)}"
        )
    if FLAGS.mixed and FLAGS.format != "gguf":
        raise UserError(f"--mixed: does not apply to --format={FLAGS.format}; leave it out")
    workdir, out = local_directory("workdir", FLAGS.workdir), local_directory("out", FLAGS.out)
    try:
        return _export(workdir, out)
    except ParityError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return 1


def _export(workdir: Path, out: Path) -> int:
    if FLAGS.format == "hf":
        config = huggingface.export_run(workdir, out, DTYPES[FLAGS.type])
        _say(config.model, out / WEIGHTS, open_tokenizer(workdir), out)
        return 0
    if FLAGS.format == "gguf":
        return _to_gguf(workdir, out)
    done = _DRIVERS[FLAGS.format].export_run(workdir, out, FLAGS.type)
    _say(done.config.model, out, done.tokenizer, out)
    _say_parity(done.parity)
    return 0


def _to_gguf(workdir: Path, out: Path) -> int:
    done = gguf.export_run(workdir, out, FLAGS.type, FLAGS.mixed)
    _say(done.config.model, out, done.tokenizer, out)
    others = [name for name, kind in done.kinds.items() if kind not in ("f32", FLAGS.type)]
    if others:
        print(f"in f16, as {FLAGS.type} does not fit their rows: {len(others)} tensors ({others[0]}, ...)")
    if done.parity is None:
        print(f"parity: not checked, as llama.cpp is not installed ({llama_cpp.INSTALL})")
    else:
        _say_parity(done.parity)
    return 0


def _say(m: ModelConfig, weights: Path, tokenizer: Tokenizer | None, out: Path) -> None:
    size = sum(path.stat().st_size for path in [weights, *weights.rglob("*")] if path.is_file()) / 1e6
    print(
        f"exported {m.effective_depth} layers in {FLAGS.type}, {size:.1f} MB; "
        f"tokenizer: {tokenizer.spec if tokenizer else 'the run keeps none'}; see {out}"
    )
    if m.effective_depth == m.depth:
        return
    if FLAGS.format in _BLOCKS:
        print(f"{m.depth} blocks are applied as {m.effective_depth} layers, and their weights stored once")
    else:
        print(
            f"{m.depth} shared blocks were written out as {m.effective_depth} layers: a plain Llama cannot "
            "share them"
        )


def _say_parity(found: Parity) -> None:
    rounding = f"; {FLAGS.type} itself changes them by {found.rounding:.1e}" if found.rounding else ""
    print(
        f"parity: logits of {found.library} within {found.difference:.1e} of the largest (at most "
        f"{found.bound:.0e}), the same most probable token at {found.agreeing} of {found.positions} "
        f"positions{rounding}"
    )
    if found.texts:
        print(f"parity: the same token ids in {found.texts} of {found.texts} texts")


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
