"""The models that several parts measure."""

from collections.abc import Sequence

import jax
from absl import flags

from configs import base, mobilellm
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.errors import UserError, did_you_mean

# As a study at its `tiny` preset, and about as large as a laptop trains in minutes.
_SMALL = {
    "4 x 48": {"model.vocab_size": 512, "model.depth": 4, "model.width": 48, "model.num_heads": 3},
    "12 x 128": {"model.vocab_size": 4096, "model.depth": 12, "model.width": 128, "model.num_heads": 4},
}
STEPS = {"4 x 48": 50, "12 x 128": 5}  # of a turn on a CPU: the first one has cold caches
_QUICK = {"model.depth": 2, "model.width": 32, "model.num_heads": 2, "model.vocab_size": 512}


def asked() -> list[str]:
    """Names of the models in `--shapes`, for use in a file name."""
    return [shape.replace(" ", "_") for shape in flags.FLAGS.shapes]


def chosen(names: Sequence[str]) -> list[str]:
    """Selects those of `names` that are in `--shapes`; all if the flag is not given.

    Raises:
      UserError: `--shapes` has a name that is not in `names`.
    """
    for shape in flags.FLAGS.shapes:
        if shape not in names:
            raise UserError(f"--shapes={shape}: unknown model; {did_you_mean(shape, names)}")
    return [name for name in names if not flags.FLAGS.shapes or name in flags.FLAGS.shapes]


def config_of(name: str, rows: int, length: int, quick: bool, **fields: object) -> Config:
    """Config whose programs can be compiled, with the fastest settings on this platform; reads no data.

    Args:
      name: "4 x 48" or "12 x 128" (blocks x width), or a preset of `configs/mobilellm.py`.
      rows, length: the size of a batch.
      quick: a model of two blocks instead, for tests.
      fields: others of the model: sharing="immediate".
    """
    config = base.get_config() if name in _SMALL or quick else mobilellm.get_config(name)
    base.update(config, _QUICK if quick else _SMALL.get(name, {}))
    if jax.default_backend() == "cpu":  # few have bfloat16; the memory suffices at these sizes
        config.model.compute_dtype = "float32"
        config.model.remat = "dots"
    if jax.default_backend() == "gpu":
        config.model.compute_dtype = "bfloat16"
        config.model.remat = "none"
        config.model.scan_unroll = 1000  # no loop
    config.data.tokenizer = "bytes"
    sizes = {"train.batch_size": rows, "train.eval_batch_size": rows, "data.sequence_length": length}
    return from_config_dict(
        base.update(config, {**sizes, **{f"model.{name}": value for name, value in fields.items()}})
    )
