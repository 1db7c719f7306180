"""Cost of sharding: one step of one model on 8 simulated CPU devices, against the same step on one.

The devices share the cores of this machine, so the same work takes the same time at best: a ratio above 1 is
the cost of collectives and of smaller matrix products. The links of real devices are not measured. The number
of devices is fixed when jax starts, so each mesh has a process of its own, which is idle in other turns.
Always on the CPU.

  python -m experiments.benchmarks.sharding '{"data": 8, "fsdp": 1, "tensor": 1}' 3 1    # one of them
"""

import contextlib
import json
import math
import sys

from experiments.benchmarks import measure as m

_ONE = "1 device"
_MESHES = {
    _ONE: {"data": 1, "fsdp": 1, "tensor": 1},
    "data:8": {"data": 8, "fsdp": 1, "tensor": 1},
    "fsdp:8": {"data": 1, "fsdp": 8, "tensor": 1},
    "data:2,fsdp:4": {"data": 2, "fsdp": 4, "tensor": 1},
    "data:2,tensor:4": {"data": 2, "fsdp": 1, "tensor": 4},
    "data:2,fsdp:2,tensor:2": {"data": 2, "fsdp": 2, "tensor": 2},
}
_MODEL = {
    "model.depth": 4,
    "model.width": 256,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "data.tokenizer": "bytes",
    "data.sequence_length": 128,
    "train.batch_size": 32,
    "train.eval_batch_size": 32,
}
_QUICK = {"model.depth": 1, "model.width": 32, "data.sequence_length": 16, "train.batch_size": 8}


def measure(quick: bool) -> list[m.Line]:
    """Measures the seconds of a step on one device, and the ratio to it for each mesh."""
    steps, turns = (1, 2) if quick else (3, 5)
    names = [_ONE, "fsdp:8"] if quick else list(_MESHES)
    with contextlib.ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                m.process(name, __name__, json.dumps(_MESHES[name]), str(steps), str(int(quick)))
            )
            for name in names
        }
        seconds = m.alternate(sides, turns)
    one = m.Line(f"a step on {_ONE}", "s", tuple(s / steps for s in seconds[_ONE]))
    split = [m.Line(f"{name} / {_ONE}", "x", m.ratios(seconds[name], seconds[_ONE])) for name in names[1:]]
    return [one, *split]


def _serve(mesh: dict[str, int], steps: int, quick: bool) -> None:
    """Takes `steps` steps for each line on stdin, and prints "done"."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(mesh.values()))
    from configs import base
    from experiments.benchmarks.trainer import Trainer
    from mobilellm_jax.config import from_config_dict

    sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    fields = {**_MODEL, **(_QUICK if quick else {}), **sizes}
    trainer = Trainer(from_config_dict(base.update(base.get_config(), fields)))
    batches = trainer.random_batches()
    for _ in sys.stdin:
        trainer.train(batches, steps)
        print("done", flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
