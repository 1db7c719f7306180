"""What a run needs of a machine that is not there: memory, work and traffic of each device of a mesh.

  python -m experiments.plan --config=configs/mobilellm.py:125m --mesh=data:64,fsdp:4
  python -m experiments.plan --config=configs/base.py --mesh=data:8 --config.train.batch_size=64

Runs on a CPU, and trains nothing. The training step is lowered for TPU and CUDA on an abstract mesh, which
finds what does not divide and what has no code for these platforms; it is not compiled for them. State and
gradients are exact, activations an estimate (`accounting.activation_bytes`), collectives as XLA's
partitioner writes them (`collectives.py`).
"""

import dataclasses
import difflib
import functools
import math
import re
from typing import Any

import jax
from absl import flags
from jax.sharding import AbstractMesh, AxisType

from experiments import cli
from mobilellm_jax.config import Config, MeshConfig, from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.costs.collectives import Collective, count_collectives, partitioned_text
from mobilellm_jax.dtypes import with_dtype
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.teacher import distillation_of
from mobilellm_jax.training.programs import make_programs

FLAGS = flags.FLAGS

PLATFORMS = ("tpu", "cuda")
_MOST = 4096  # devices; simulating them takes threads and memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step takes, everything but `tokens` and FLOPs for one device.

    Attributes:
      tokens: of a step, over all devices.
      model_flops, executed_flops: of a step, over all devices; see `accounting`.
      rows: of a micro-batch.
      parameter_bytes, optimizer_bytes, teacher_bytes: what the device holds all the time.
      gradient_bytes: float32, split like the parameters.
      activation_bytes: about the largest memory that activations take.
    """

    tokens: int
    model_flops: float
    executed_flops: float
    rows: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    teacher_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        held = self.parameter_bytes + self.optimizer_bytes + self.teacher_bytes
        return held + self.gradient_bytes + self.activation_bytes


def define_flags() -> None:
    flags.DEFINE_string(
        "mesh",
        "",
        "sizes of the mesh axes, such as data:64,fsdp:4,tensor:1; without it, one device",
    )


def main() -> int:
    """Prints the plan, and returns the exit status."""
    config = with_dtype(from_config_dict(cli.one_config()), lambda: "tpu")  # or a GPU, with the same dtype
    m = dataclasses.replace(config.model, attention="auto")  # a platform's own kernel lowers for it alone
    config = dataclasses.replace(config, model=m)
    sizes = parse_mesh(FLAGS.mesh)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(sizes))
    mesh = abstract_mesh(sizes)
    plan = make_plan(config, mesh)
    where = f"{mesh.size} devices: {FLAGS.mesh}" if FLAGS.mesh else "one device"
    print(f"{cli.config_spec()} on {where}\n")
    print(f"lowers for {' and '.join(lowers_for(config, mesh))}\n")
    print(table(plan, mesh.size), flush=True)
    filled = MeshConfig(**dict(zip(partition.AXES, sizes, strict=True)))
    print("\n" + traffic_table(traffic(dataclasses.replace(config, mesh=filled))))
    return 0


def parse_mesh(text: str) -> tuple[int, int, int]:
    """The sizes of (data, fsdp, tensor) in "data:64,fsdp:4"; of "" those of one device.

    Raises:
      UserError: it has another form, or more devices than can be simulated.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\w+):0*([1-9]\d{0,8})", part.strip())
        if not match or match[1] not in partition.AXES or match[1] in sizes:
            name = re.split(r"\W", part.strip())[0]
            near = difflib.get_close_matches(name, partition.AXES, n=1)
            hint = f"; did you mean {near[0]}?" if near and name not in partition.AXES else ""
            raise UserError(
                f"--mesh={text}: {part!r} is not a new axis and its size; expected some of "
                f"data:64,fsdp:4,tensor:1{hint}"
            )
        sizes[match[1]] = int(match[2])
    if math.prod(sizes.values()) > _MOST:
        raise UserError(
            f"--mesh={text}: {math.prod(sizes.values()):,} devices; at most {_MOST:,} can be simulated"
        )
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in partition.AXES)
    return data, fsdp, tensor


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh(sizes, partition.AXES, axis_types=(AxisType.Auto,) * 3)


def make_plan(config: Config, mesh: AbstractMesh) -> Plan:
    """The cost of a training step, from shapes and shardings alone.

    Raises:
      UserError: the mesh does not divide a model or the batch, or there is no teacher where one is named.
    """
    distillation = distillation_of(config)
    teacher = distillation and distillation.model
    partition.check_divisible(config, mesh, teacher)
    t, length = config.train, config.data.sequence_length
    programs = make_programs(config, mesh, distillation)
    state, parameters = programs.state, _device_bytes(programs.state.params)
    tokens = t.batch_size * length
    rows = t.batch_size // t.accumulation_steps // (mesh.shape["data"] * mesh.shape["fsdp"])
    # What "tensor" leaves of the model for a device: its part of the heads, feed-forward width, vocabulary.
    split = ("num_heads", "num_kv_heads", "ffn_width", "vocab_size")
    parts = {name: getattr(config.model, name) // mesh.shape["tensor"] for name in split}
    mean = functools.partial(accounting.over_loops, config)
    return Plan(
        tokens=tokens,
        model_flops=tokens * mean(lambda m: accounting.train_flops_per_token(m, length, teacher)),
        executed_flops=tokens * mean(lambda m: accounting.executed_train_flops_per_token(m, length, teacher)),
        rows=rows,
        parameter_bytes=parameters,
        optimizer_bytes=_device_bytes(state.opt_state),
        gradient_bytes=parameters,
        activation_bytes=accounting.activation_bytes(
            dataclasses.replace(config.model, **parts), length, rows, teacher
        ),
        teacher_bytes=_device_bytes(programs.teacher),
    )


def _device_bytes(tree: Any) -> int:
    """The bytes that one device holds of a tree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _traced(config: Config, mesh: Any) -> Any:
    return make_programs(config, mesh, distillation_of(config)).trace_step()


def lowers_for(config: Config, mesh: AbstractMesh) -> tuple[str, ...]:
    """Lowers the training step for every one of `PLATFORMS`, and returns them; raises where one fails."""
    _traced(config, mesh).lower(lowering_platforms=PLATFORMS)
    return PLATFORMS


def traffic(config: Config) -> list[Collective]:
    """The collectives of a training step on the mesh of `config`, out of as many simulated devices.

    Raises:
      RuntimeError: there are fewer: set `jax_num_cpu_devices` before the first use of jax.
    """
    m = config.mesh
    devices = jax.devices("cpu")[: m.data * m.fsdp * m.tensor]
    mesh = partition.make_mesh(m, devices)
    return count_collectives(partitioned_text(_traced(config, mesh).lower()))


def table(plan: Plan, devices: int) -> str:
    """The plan as text, a line for each number."""
    rows = [
        ("tokens per step", f"{plan.tokens:,}"),
        ("FLOPs per step, of the model", f"{plan.model_flops:.4g}"),
        ("FLOPs per step, with masked and repeated attention", f"{plan.executed_flops:.4g}"),
        ("for each device", ""),
        ("  FLOPs per step", f"{plan.model_flops / devices:.4g}"),
        ("  rows of a micro-batch", f"{plan.rows:,}"),
        ("  parameters", _size(plan.parameter_bytes)),
        ("  optimizer state", _size(plan.optimizer_bytes)),
        *([("  parameters of the teacher", _size(plan.teacher_bytes))] if plan.teacher_bytes else []),
        ("  gradients", _size(plan.gradient_bytes)),
        ("  activations, about", _size(plan.activation_bytes)),
        ("  memory, about", _size(plan.memory_bytes)),
    ]
    return "\n".join(f"{name:<52}{value:>20}".rstrip() for name, value in rows)


def traffic_table(collectives: list[Collective]) -> str:
    """The collectives as text, a line for each kind and number of devices that take part."""
    if not collectives:
        return "collectives per step: none"
    rows = [("collectives per step", "among", "count", "arrays", "sent by a device")]
    rows += [
        (c.kind, f"{c.among}", f"{c.count:,}", _size(c.array_bytes), _size(c.sent_bytes)) for c in collectives
    ]
    count, sent = sum(c.count for c in collectives), sum(c.sent_bytes for c in collectives)
    rows.append(("all", "", f"{count:,}", "", _size(sent)))
    return "\n".join(f"{a:<24}{b:>8}{c:>10}{d:>16}{e:>20}" for a, b, c, d, e in rows)


def _size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point, such as "1.50 GB"."""
    number, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.2f} {unit}"


if __name__ == "__main__":
    cli.run(main, default_config="configs/base.py", define_flags=define_flags)
