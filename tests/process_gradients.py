"""One of the processes of test_processes.py: writes loss, gradients and initial parameters of many meshes.

  python tests/process_gradients.py PORT PROCESSES PROCESS OUT.npz CASES

CASES are sizes of a mesh, each with a place in conftest.SHARING, such as "2,1,1 0;1,2,1 3". Parameters are
initialized in the first case of each mesh alone: they do not depend on the strategy, and take as long to
compile as the gradients.
"""

import sys

import conftest
import jax
import numpy as np
from jax.experimental import multihost_utils

from mobilellm_jax import model
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.parallel import partition, processes

port, count, index, out, cases = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 1)
processes.start(f"localhost:{port}", int(count), int(index), 280.0, "")
found, initialized = {}, set()
for case in cases.split(";"):
    text, place = case.split()
    m = conftest.tiny_model(**conftest.SHARING[int(place)])
    tokens_BT, targets_BT = conftest.random_batch(m)
    sizes = dict(zip(partition.AXES, map(int, text.split(",")), strict=True))
    mesh = partition.make_mesh(MeshConfig(**sizes))
    share = partition.process_share(mesh)
    rows = slice(share["process_index"], None, share["process_count"])
    shardings, by_rows = partition.shardings(conftest.shapes(m), mesh), partition.batch_sharding(mesh)
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
    arrays = {"gradients": gradients, "nats": nats}
    if text not in initialized:
        init = jax.jit(model.init, static_argnums=1, out_shardings=shardings)
        arrays["initial"] = init(jax.random.key(0), m)
        initialized.add(text)
    arrays = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), arrays)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[f"{case} {name}"] = leaf
if jax.process_index() == 0:
    np.savez(out, **found)
