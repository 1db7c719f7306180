"""Points of all studies lower for TPU and CUDA from a CPU, on up to 256 devices: one of each kind of program.

Programs of one kind differ in sizes alone, of which only divisibility matters to lowering: it is tested for
every point.
"""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from jax.sharding import AbstractMesh, AxisType

from configs import base, mobilellm
from mobilellm_jax.chunks import chunks
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.parallel import partition
from mobilellm_jax.training.programs import compile_key, make_programs

DEVICES = 256
# Collections of studies have no points of their own.
MODULES = [
    importlib.import_module(f"configs.{path.stem}") for path in sorted(Path("configs").glob("[!_]*.py"))
]
# The first of their kinds; the others are slow.
_FAST = (
    "base",
    "mobilellm:tiny",
    "mobilellm:125m",
    "layer_sharing:tiny",
    "layer_sharing:paper",
    "loops:text_laptop 1 immediate 4 False 0  False False 1..4",
)
STUDIES = [module for module in MODULES if hasattr(module, "sweep")]


def all_configs() -> Iterator[tuple[str, Config]]:
    """Yields every config once, with a name; points that two studies share are one."""
    seen = set()
    yield "base", from_config_dict(base.get_config())
    for study in STUDIES:
        collections = getattr(study, "COLLECTIONS", ())
        for preset in (preset for preset in study.PRESETS if preset not in collections):
            for overrides in study.sweep(preset):
                config = from_config_dict(base.update(study.get_config(preset), overrides))
                config = with_dtype(config, lambda: "tpu")
                if (key := compile_key(config)) not in seen:
                    seen.add(key)
                    words = " ".join(str(value) for value in overrides.values())
                    yield f"{study.__name__.removeprefix('configs.')}:{preset} {words}", config
    muon = base.update(mobilellm.get_config("125m"), {"optimizer.name": "muon"})
    yield "mobilellm:125m with muon", from_config_dict(muon)


def largest_mesh(config: Config) -> AbstractMesh:
    """Returns a mesh of as many of the devices as the batch, the width and the heads can be split over."""
    m, t = config.model, config.train
    rows = math.gcd(t.batch_size // t.accumulation_steps, t.eval_batch_size, DEVICES)
    fsdp = math.gcd(rows, m.width, 4)
    tensor = math.gcd(m.num_heads, m.num_kv_heads, m.ffn_width, m.vocab_size, DEVICES // rows)
    return AbstractMesh((rows // fsdp, fsdp, tensor), partition.AXES, axis_types=(AxisType.Auto,) * 3)


def kind(config: Config) -> tuple[Any, ...]:
    """Settings that change the structure of a program, not only its sizes."""
    m, length = config.model, config.data.sequence_length
    words = (value for value in compile_key(config).values if isinstance(value, str | bool))
    return (
        *("plan" if value == m.sharing and " " in m.sharing else value for value in words),
        *(size > 1 for size in largest_mesh(config).axis_sizes),
        m.num_kv_heads < m.num_heads,
        m.loop_rank > 0,
        config.train.lora_rank > 0,
        config.train.accumulation_steps > 1,
        m.scan_unroll >= m.effective_depth,
        len(list(chunks(length))),  # of attention, one after the other
        length > m.loss_chunk,
        length % m.loss_chunk > 0,
    )


EVERY = list(all_configs())
FIRSTS = list({kind(config): (name, config) for name, config in reversed(EVERY)}.values())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name.startswith(_FAST) else [pytest.mark.slow])
        for name, config in reversed(FIRSTS)
    ],
)
def test_the_train_step_lowers(config):
    mesh = largest_mesh(config)
    traced = make_programs(config, mesh).trace_step()
    lowered = traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
    assert "stablehlo.while" in lowered  # one loop over the layer plan, whatever its length
    assert "sharding" in lowered


def test_every_point_can_be_split_over_devices():
    for name, config in EVERY:
        mesh = largest_mesh(config)
        partition.check_divisible(config, mesh)
        assert mesh.size > 1, name


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_train_step_lowers_with_the_attention_of_tpus(sizes):
    """Forward, and two kernels backward: with `dots`, the forward pass is not repeated."""
    fields = {"model.attention": "splash", "model.compute_dtype": "bfloat16", "model.remat": "dots"}
    config = tiny_config(**fields, **{"data.sequence_length": 150})
    mesh = AbstractMesh(sizes, partition.AXES, axis_types=(AxisType.Auto,) * 3)
    lowered = make_programs(config, mesh).trace_step().lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("stablehlo.custom_call @tpu_custom_call") == 3


def test_the_published_models_fill_the_largest_mesh():
    published = [preset for preset in mobilellm.PRESETS if preset not in ("tiny", "small")]
    meshes = [largest_mesh(from_config_dict(mobilellm.get_config(preset))) for preset in published]
    assert [mesh.shape_tuple for mesh in meshes] == [(("data", 64), ("fsdp", 4), ("tensor", 1))] * len(
        published
    )
