"""Export a run, trained or imported, to a folder that transformers loads without remote code.

  python -m experiments.export_hf --workdir=runs/first --target=exported
  python -m experiments.export_hf --workdir=runs/first --target=exported_bf16 --dtype=bfloat16

  AutoModelForCausalLM.from_pretrained("exported")

A shared block is written out once for each time it is applied: the result is a plain Llama of that many
layers. `experiments.import_hf` takes it back, bit for bit in float32.
"""

import json
from pathlib import Path

from absl import flags

from experiments import cli
from mobilellm_jax import huggingface
from mobilellm_jax.errors import UserError
from mobilellm_jax.huggingface_config import check_exportable, export_config, read_object
from mobilellm_jax.run import IMPORTED, TOKENIZER, open_run, open_tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run")
_TARGET = flags.DEFINE_string("target", None, "folder to make")
_DTYPE = flags.DEFINE_enum("dtype", "float32", huggingface.DTYPES, "of the weights")


def main() -> int:
    """Exports, and returns the exit status."""
    if not _WORKDIR.value:
        raise UserError("--workdir: say which run to export, such as --workdir=runs/first")
    workdir = Path(_WORKDIR.value)
    with cli.new_directory("target", _TARGET.value) as target:
        config, params = open_run(workdir)
        check_exportable(config.model)
        tokenizer = open_tokenizer(workdir)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos")}
        if (workdir / IMPORTED).exists():
            hf = read_object(workdir / IMPORTED)["config"]
            special = {name: hf.get(name) for name in special}
        if tokenizer is not None:
            huggingface.write_tokenizer(target, tokenizer, workdir / TOKENIZER)
        values = export_config(config, _DTYPE.value, special)
        (target / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        huggingface.write_params(target / huggingface.WEIGHTS, params, config.model, _DTYPE.value)
    size = (Path(_TARGET.value) / huggingface.WEIGHTS).stat().st_size
    print(
        f"exported {config.model.effective_depth} layers in {_DTYPE.value}, {size / 1e6:.1f} MB; "
        f"tokenizer: {tokenizer.spec if tokenizer else 'none in this run'}; see {_TARGET.value}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
