"""Shardings of parameters and batches on the device mesh, from `parameters.AXES`.

The mesh has three axes. `data` replicates the model, `fsdp` splits parameters and optimizer state,
`tensor` splits heads, feed-forward width and vocabulary; the batch is split over `data` and `fsdp`. One
device is the 1 x 1 x 1 mesh: there is no other code path.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from mobilellm_jax import parameters
from mobilellm_jax.config import Config, MeshConfig, ModelConfig
from mobilellm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # rows of a batch; their tokens are not split

_CONSTANTS = {"ns_coeffs"}  # in optax's state of Muon


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor), with -1 inferred from the number of devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        raise UserError(
            f"mesh: data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not fill "
            f"{num_devices} device(s); the sizes must multiply to {num_devices}, or leave one as -1"
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices`, by default all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def in_use(mesh: Mesh | AbstractMesh) -> AbstractContextManager[Any]:
    """Context manager in which the model shards its activations over `mesh`, see `model.hidden`."""
    return use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh)


def check_divisible(config: Config, mesh: Mesh | AbstractMesh, teacher: ModelConfig | None = None) -> None:
    """Checks that the mesh divides the model, the batch and the model of a teacher.

    Raises:
      UserError: an axis does not divide; the message names the field and the valid sizes.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    micro_batch = config.train.batch_size // config.train.accumulation_steps
    requirements = [
        ("train.batch_size / train.accumulation_steps", micro_batch, "mesh.data x mesh.fsdp", rows),
        ("train.eval_batch_size", config.train.eval_batch_size, "mesh.data x mesh.fsdp", rows),
        *(
            (f"{whose}model.{axis.size}", getattr(m, axis.size), f"mesh.{axis.mesh}", mesh.shape[axis.mesh])
            for whose, m in (("", config.model), ("train.teacher: its ", teacher))
            for axis in parameters.AXES.values()
            if axis.mesh and m is not None
        ),
    ]
    for field, size, axis, ways in requirements:
        if size % ways:
            valid = [str(n) for n in range(1, min(size, 4096) + 1) if size % n == 0]
            raise UserError(
                f"{field}: {size} is not divisible by {axis}={ways}; {axis} could be {', '.join(valid)}"
            )


def parameter_spec(path: str, ndim: int) -> PartitionSpec:
    """The `PartitionSpec` of a parameter, or of optimizer state, by the end of its path.

    Optimizer moments end in the path of their parameter and are split like it; counters have no axes.

    Raises:
      UserError: the path does not end in that of a parameter.
    """
    names = path.split("/")
    if ndim == 0 or names[-1] in _CONSTANTS:
        return PartitionSpec()
    ends = ("/".join(names[i:]) for i in range(len(names)))
    name = next((end for end in ends if end in parameters.PARAMETERS), path)
    return PartitionSpec(*parameters.parameter(name).mesh_axes)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A tree of `NamedSharding` for parameters, optimizer state or a whole train state."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, parameter_spec(name, leaf.ndim))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def process_share(mesh: Mesh) -> dict[str, int]:
    """The process_index and process_count with which this process calls `Dataset.train_batches`.

    Processes whose devices get the same rows, being connected by `tensor`, read the same rows.

    Raises:
      UserError: two processes share some of their rows, but not all.
    """
    devices = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return _share([[device.process_index for device in row] for row in devices], jax.process_index())


def _share(processes_of_row: Sequence[Sequence[int]], process: int) -> dict[str, int]:
    rows_of: dict[int, list[int]] = {}
    for row, holders in enumerate(processes_of_row):
        for holder in dict.fromkeys(holders):
            rows_of.setdefault(holder, []).append(row)
    shares = sorted({tuple(rows) for rows in rows_of.values()})
    if sum(map(len, shares)) != len(processes_of_row):
        raise UserError(
            f"mesh.tensor: {len(processes_of_row[0])} does not fit {len(rows_of)} processes; "
            "it must divide the number of devices per process, or be a multiple of it"
        )
    return {"process_index": shares.index(tuple(rows_of[process])), "process_count": len(shares)}


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)
