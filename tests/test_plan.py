"""Plans for machines that are not there: bytes per device, collectives counted, every model on big meshes."""

import jax
import jax.numpy as jnp
import pytest
from commands import command
from conftest import tiny_config
from jax.sharding import PartitionSpec

from configs import mobilellm
from experiments import plan
from mobilellm_jax.config import MeshConfig, from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.collectives import Collective, count_collectives, partitioned_text
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition

MESHES = {
    "125m": (256, 1, 1),
    "ls_125m": (64, 4, 1),
    "350m": (16, 16, 1),
    "ls_350m": (32, 1, 5),
    "600m": (64, 2, 2),
    "1b": (32, 8, 1),
    "1.5b": (8, 32, 1),
    "tiny": (2, 2, 1),
    "small": (8, 4, 1),
    "paper": (16, 4, 4),
}


def test_collectives_of_a_program_written_by_hand():
    """Three turns of a sum over 4 and one gathering over 2, in arrays of 12 and 8 numbers."""
    mesh = partition.make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))

    def program(x, y):
        turn = lambda total, _: (jax.lax.psum(total, "data") * 0.5, None)  # noqa: E731
        total, _ = jax.lax.scan(turn, x, length=3)
        return total, jax.lax.all_gather(y, "fsdp", tiled=True)

    mapped = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("fsdp")),
        out_specs=(PartitionSpec(), PartitionSpec()),
        check_vma=False,
    )
    text = partitioned_text(jax.jit(mapped).lower(jnp.zeros((3, 4)), jnp.zeros(8, jnp.bfloat16)))
    assert count_collectives(text) == [
        Collective("all-reduce", among=4, count=3, array_bytes=3 * 12 * 4, sent_bytes=3 * 2 * 36),
        Collective("all-gather", among=2, count=1, array_bytes=8 * 2, sent_bytes=8),
    ]


@pytest.mark.parametrize(
    ("groups", "among"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", 2),
    ],
)
def test_groups_of_devices_as_xla_writes_them(groups, among):
    line = (
        f"  ROOT %r = s32[4]{{0}} reduce-scatter(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    )
    (found,) = count_collectives("ENTRY %main () -> s32[4] {\n" + line)
    assert (found.among, found.array_bytes) == (among, among * 16)


def test_a_loop_of_unknown_length_is_refused():
    lines = ["%c (p: s32[]) -> pred[] {", "  ROOT %lt = pred[] compare(%a, %b), direction=LT", "}"]
    lines += ["ENTRY %main () -> s32[] {", "  %w = s32[] while(%t), condition=%c, body=%b, x"]
    with pytest.raises(ValueError, match=r"cannot read the length of the loop with condition c$"):
        count_collectives("\n".join(lines))


def test_data_parallelism_sums_gradients_in_every_use_of_a_block_and_every_chunk_of_the_loss():
    overrides = {"model.sharing": "reverse", "model.num_repeats": 2, "model.loss_chunk": 3}
    config = tiny_config(**overrides, **{"mesh.data": 8})
    counts = accounting.parameters(config.model)
    collectives = plan.traffic(config)
    gradients = 2 * (counts.non_embedding - config.model.width) + config.model.width
    numbers = sum(c.array_bytes for c in collectives) / 4 - gradients - counts.embedding * (1 + 9 // 3)
    assert {(c.kind, c.among) for c in collectives} == {("all-reduce", 8)}
    assert 0 <= numbers < 20  # losses and counts


def test_traffic_is_the_same_with_a_cache_of_compiled_programs(tmp_path):
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        first, second = (plan.traffic(tiny_config(**{"mesh.data": 8})) for _ in range(2))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert first == second != []


def test_tensor_parallelism_sums_activations():
    collectives = plan.traffic(tiny_config(**{"mesh.data": 1, "mesh.tensor": 2}))
    assert {c.among for c in collectives} == {2}
    rows = 8 * 9 * 24 * 4
    assert sum(c.array_bytes for c in collectives) > 2 * 4 * rows  # two in each of two layers, there and back


def test_one_device_sends_nothing():
    assert count_collectives(partitioned_text(jax.jit(jnp.sin).lower(1.0))) == []


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[pytest.mark.slow] * (p != "ls_125m")) for p in mobilellm.PRESETS]
)
def test_every_model_on_a_mesh_of_up_to_256_devices(preset):
    config, sizes = from_config_dict(mobilellm.get_config(preset)), MESHES[preset]
    mesh = plan.abstract_mesh(sizes)
    found = plan.make_plan(config, mesh)
    data, fsdp, tensor = sizes
    counts = accounting.parameters(config.model)
    held = 4 * ((counts.total - counts.norms) // (fsdp * tensor) + counts.norms)
    assert found.parameter_bytes == found.gradient_bytes == held
    assert found.optimizer_bytes - 2 * held in range(64)  # two moments, and counters
    assert found.rows * data * fsdp == config.train.batch_size
    whole = accounting.activation_bytes(config.model, config.data.sequence_length, found.rows)
    assert whole / tensor <= found.activation_bytes <= whole - (tensor > 1)
    assert plan.lowers_for(config, mesh) == ("tpu", "cuda")


def test_estimated_memory_is_about_what_xla_sets_aside():
    """On simulated devices, of a model that is large enough for activations to matter."""
    overrides = {"model.width": 64, "model.head_dim": 16, "model.ffn_width": 128, "data.sequence_length": 64}
    config = tiny_config(**overrides, **{"model.loss_chunk": 64})
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    memory = plan._traced(config, mesh).lower().compile().memory_analysis()
    found = plan.make_plan(config, plan.abstract_mesh((2, 2, 2)))
    state = found.parameter_bytes + found.optimizer_bytes
    assert 0 < memory.argument_size_in_bytes - state < 1024  # rows and learning rate
    assert memory.temp_size_in_bytes == pytest.approx(found.memory_bytes - state, rel=0.5)


def test_shards_are_those_of_real_arrays():
    config = tiny_config()
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = plan.make_programs(config, mesh).init(jax.random.key(0))
    device = jax.devices()[5]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves((state.params, state.opt_state))
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    found = plan.make_plan(config, plan.abstract_mesh((2, 2, 2)))
    assert found.parameter_bytes + found.optimizer_bytes == held


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp:4", "'fdsp:4' is not a new axis and its size; expected .*tensor:1; did you mean fsdp\\?$"),
        ("data:0", "'data:0' is not"),
        ("data=4", "'data=4' is not a new axis and its size; expected some of data:64,fsdp:4,tensor:1$"),
        ("model:4", "'model:4' is not"),
        ("data:4,data:2", "'data:2' is not a new axis and its size"),
        ("data:4096,fsdp:2", "8,192 devices; at most 4,096"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(UserError, match=f"--mesh={text}: .*{message}"):
        plan.parse_mesh(text)
    assert plan.parse_mesh("fsdp:4, data:64") == (64, 4, 1)
    assert plan.parse_mesh("") == (1, 1, 1)


def test_a_mesh_that_does_not_divide_is_refused_with_what_would_work():
    with pytest.raises(UserError, match=r"num_kv_heads: 2 .* mesh\.tensor could be 1, 2$"):
        plan.make_plan(tiny_config(), plan.abstract_mesh((2, 1, 4)))


def test_the_command_on_256_devices():
    flags = ["--mesh=data:64,fsdp:4", "--config.train.batch_size=256", "--config.train.eval_batch_size=256"]
    result = command("experiments.plan", *flags, "--config.model.depth=2")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "on 256 devices: data:64,fsdp:4\n\nlowers for tpu and cuda\n" in result.stdout
    found = [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("all-")]
    assert {("all-gather", "4"), ("all-reduce", "256")} <= {tuple(words) for words in found}
