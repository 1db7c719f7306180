"""Every config and every point of every study lowers for TPU and CUDA from a CPU, on a mesh of 8 devices."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import (
    base,
    depth_vs_width,
    embedding_sharing,
    followups,
    head_groups,
    khop,
    layer_sharing,
    mobilellm,
    repeats,
    roadmap,
)
from mobilellm_jax import partition
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.train import make_programs

MESH = AbstractMesh((8, 1, 1), partition.AXES, axis_types=(AxisType.Auto,) * 3)


def programs() -> Iterator[tuple[str, Config]]:
    """Yields every config once; points that two studies share make one program."""
    seen = set()
    for study in (
        depth_vs_width,
        layer_sharing,
        khop,
        head_groups,
        embedding_sharing,
        repeats,
        roadmap,
        mobilellm,
        followups,
    ):
        for preset in study.PRESETS:
            for overrides in study.sweep(preset):
                config = from_config_dict(base.update(study.get_config(preset), overrides))
                if config not in seen:
                    seen.add(config)
                    words = " ".join(str(value) for value in overrides.values())
                    yield f"{study.__name__.removeprefix('configs.')}:{preset} {words}", config
    muon = base.update(mobilellm.get_config("125m"), {"optimizer.name": "muon"})
    yield "mobilellm:125m with muon", from_config_dict(muon)


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in programs()])
def test_the_train_step_lowers(config):
    step = make_programs(config, MESH)
    traced = step.step.trace(step.state, step.rows, jax.ShapeDtypeStruct((), jnp.float32))
    lowered = traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
    assert "stablehlo.while" in lowered  # one loop over the layer plan, whatever its length
    assert "sharding" in lowered
