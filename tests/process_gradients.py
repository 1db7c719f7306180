"""One of the processes of test_processes.py: writes loss, gradients and initial parameters of many meshes.

  python tests/process_gradients.py PORT PROCESSES PROCESS OUT.npz MESHES STRATEGIES

MESHES are sizes such as 2,1,1;1,2,1, STRATEGIES the number of entries of conftest.SHARING.
"""

import sys

import conftest
import jax
import numpy as np
from jax.experimental import multihost_utils

from mobilellm_jax import model
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.parallel import partition, processes

port, count, index, out, meshes, strategies = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 1)
processes.start(f"localhost:{port}", int(count), int(index), 280.0, "")
found = {}
for sharing in conftest.SHARING[: int(strategies)]:
    m = conftest.tiny_model(**sharing)
    tokens_BT, targets_BT = conftest.random_batch(m)
    for text in meshes.split(";"):
        sizes = dict(zip(partition.AXES, map(int, text.split(",")), strict=True))
        mesh = partition.make_mesh(MeshConfig(**sizes))
        share = partition.process_share(mesh)
        rows = slice(share["process_index"], None, share["process_count"])
        shardings, by_rows = partition.shardings(conftest.shapes(m), mesh), partition.batch_sharding(mesh)
        initial = jax.jit(model.init, static_argnums=1, out_shardings=shardings)(jax.random.key(0), m)
        batch = [
            jax.make_array_from_process_local_data(by_rows, array[rows]) for array in (tokens_BT, targets_BT)
        ]
        params = jax.device_put(conftest.random_params(m), shardings)
        with partition.in_use(mesh):
            (nats, _), gradients = jax.jit(
                jax.value_and_grad(model.loss, has_aux=True),
                static_argnums=3,
                out_shardings=(None, shardings),
            )(params, *batch, m)
        arrays = {"initial": initial, "gradients": gradients, "nats": nats}
        arrays = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), arrays)
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found[f"{m.sharing} {text} {name}"] = leaf
if jax.process_index() == 0:
    np.savez(out, **found)
