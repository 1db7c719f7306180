"""What does not fit into memory is refused before the first step."""

import dataclasses

import jax
import pytest
from conftest import tiny_config

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.training import memory
from mobilellm_jax.training.programs import make_programs


def compiled(config):
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1])
    return make_programs(config, mesh).trace_step().lower().compile()


def test_a_step_that_does_not_fit_says_what_it_needs_and_what_to_lower(monkeypatch):
    config = tiny_config(**{"mesh.data": 1})
    step = compiled(config)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(make_state(config)))
    of = step.memory_analysis()
    held = of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes
    for parts, steps in ((1.1, 2), (3.9, 4), (1000, 8)):  # of 8 rows
        monkeypatch.setattr(memory, "device_bytes", lambda n=parts: held + int(of.temp_size_in_bytes / n))
        message = rf"a training step needs .*accumulation_steps={steps} or more.*remat=dots"
        with pytest.raises(UserError, match=message):
            memory.check_fits(step, config)
    monkeypatch.setattr(memory, "device_bytes", lambda: state)  # without room for anything else
    with pytest.raises(UserError, match=r"a training step needs .*remat=dots") as error:
        memory.check_fits(step, config)
    assert "micro-batches" not in str(error.value)
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    with pytest.raises(UserError) as error:
        memory.check_fits(step, full)
    assert "remat" not in str(error.value)
    monkeypatch.setattr(memory, "device_bytes", lambda: 100 * state)
    memory.check_fits(step, config)


def make_state(config):
    return make_programs(config, partition.make_mesh(config.mesh, jax.devices()[:1])).state


def test_this_machine_has_memory():
    """At least 100 MB for each simulated device, and less than 100 TB."""
    assert 1e8 < memory.device_bytes() < 1e14
