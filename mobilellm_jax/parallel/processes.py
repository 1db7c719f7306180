"""Several processes that work on one run, one for each host or device: how they start and agree.

All run the same program. Process 0 alone writes files and decides what depends on them; the others hear of it
here. With one process everything in this module returns at once.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mobilellm_jax.errors import UserError

T = TypeVar("T")


def start(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    patience_s: float,
    advice: str,
) -> None:
    """Joins the other processes; has to come before anything that uses devices.

    What is None is found out: on Cloud TPU and GKE, and under Slurm and Open MPI.

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      patience_s: seconds to wait for the others; then the process says so and ends with status 2.
      advice: what it says then.

    Raises:
      UserError: no cluster was found, or the numbers do not fit.
    """

    def give_up() -> None:
        # jax's own timeout aborts the process with a stack trace, and cannot be caught.
        print(
            f"error: timed out after {patience_s:g} s waiting for the other hosts. {advice}", file=sys.stderr
        )
        sys.stderr.flush()
        os._exit(2)

    # On CPUs, what does not depend on each other may run at once, in another order in every process, and gloo
    # then takes one message for another: seen in 1 of about 1,000 steps, between the sums of one program.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.__version_info__[:2] == (0, 10):  # an XLA that does not know the flag would not start
        one_by_one = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one_by_one}"
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    timer = threading.Timer(patience_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, initialization_timeout=round(patience_s) + 60
        )
    except (ValueError, TypeError, RuntimeError) as error:  # which one depends on the kind of cluster
        raise UserError(f"--distributed: no cluster was found, or only a part of it ({error})") from None
    finally:
        timer.cancel()


def of_first(function: Callable[[], T]) -> T:
    """Calls `function` on process 0 and broadcasts its result, which has to fit into JSON.

    A `UserError` in it is raised in all processes.
    """
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except UserError as error:
            answer = {"error": str(error)}
    content = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes, as each is compiled
    if jax.process_index() == 0:
        padded[:size] = np.frombuffer(content, np.uint8)
    answer = json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def check_same(what: str, value: str) -> None:
    """Checks that all processes have the same `value`.

    Raises:
      UserError: in all processes, where one has another.
    """
    differs = of_first(lambda: value) != value
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.bool_(differs)).any():
        raise UserError(f"{what} differs between the processes; process {jax.process_index()} has {value}")


class StopVote:
    """Lets all processes stop after the same step, whichever of them was told to.

    The votes are summed on the devices, in line with the training steps, so that nobody waits for the others.
    """

    def __init__(self, mesh: Mesh):
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, stop: bool) -> Any:
        """Returns something whose `bool` is whether any process voted to stop; all processes call this."""
        if jax.process_count() == 1:
            return stop
        shape = (self._by_device.mesh.size,)
        votes = jax.make_array_from_callback(shape, self._by_device, lambda _: np.array([stop]))
        return self._any(votes)
