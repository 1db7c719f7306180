"""The weights of a run, read from its directory."""

import dataclasses

import jax

from mobilellm_jax import model
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import adapted, merged
from mobilellm_jax.runs.directory import read_config
from mobilellm_jax.storage.checkpoint import load_params
from mobilellm_jax.storage.files import AnyPath


def open_run(workdir: AnyPath) -> tuple[Config, model.Params]:
    """Reads the config of a run and the parameters of its newest intact checkpoint, as NumPy arrays.

    The run may be trained, imported or still in progress; nothing in `workdir` is changed. Adapters are
    merged, and the config is that of a model without them.

    Raises:
      UserError: there is no run in `workdir`, its config is corrupt, or no checkpoint is intact.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: no run found, {path.name} is missing; check the path")
    config = from_config_dict(read_config(path))
    m = adapted(config)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), m))
    params = load_params(workdir / "checkpoints", like)
    if m.adapters is None:
        return config, params
    params = jax.device_get(merged(params, m))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, lora_rank=0)), params
