"""The devices of this host in groups, so that processes side by side each see one group.

The process that starts the others must not touch an accelerator: whoever opens a TPU first has it alone, and
on a GPU it takes most of the memory. A short process of its own looks at what is there.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping

from mobilellm_jax.errors import UserError

_PATIENCE_S = 300  # a TPU slice answers when all of its hosts have asked
# How the chips of a group lie on the board, as libtpu wants to be told.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_TPU_PORT = 8476  # of the first group


def seen() -> tuple[str, int]:
    """Platform and number of devices that this process sees; of a TPU, chips."""
    import jax  # here and below: `platform` does without, where there can be no accelerator

    local = jax.local_devices()  # two for a TPU chip with two cores, which only one process can have
    return local[0].platform, len({getattr(device, "coords", device.id) for device in local})


def of_host() -> tuple[str, int]:
    """`seen` in a process of its own, so that this one does not open the devices.

    Raises:
      UserError: jax finds no devices there.
    """
    program = "from experiments.runner.devices import seen; print('devices', *seen())"
    try:
        found = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--devices_per_run: no answer from the devices of this host within {_PATIENCE_S} s; on a TPU "
            "slice of several hosts, start the same command on every host"
        ) from None
    match = re.search(r"^devices (\w+) (\d+)$", found.stdout, re.MULTILINE)
    if not match:
        last = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[-1]
        raise UserError(f"--devices_per_run: jax finds no devices on this host ({last})")
    return match[1], int(match[2])


@functools.cache
def platform() -> str:
    """Platform of this host's devices, which this process does not open."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    return "cpu" if asked == "cpu" or not (asked or _supports_accelerators()) else of_host()[0]


def _supports_accelerators() -> bool:
    """Whether something is installed by which jax could find an accelerator."""
    return bool(
        importlib.metadata.entry_points(group="jax_plugins")
        or importlib.util.find_spec("jax_plugins")
        or importlib.util.find_spec("libtpu")
        or os.environ.get("TPU_LIBRARY_PATH")
    )


def stay_off(count: int) -> None:
    """Has this process, which has not used jax yet, see `count` simulated devices and no accelerator."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def groups(platform: str, count: int, size: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """For each group of devices the environment variables that limit a process to it.

    Args:
      platform, count: what `of_host` returns.
      size: devices in a group.
      environment: of this process; devices it is limited to already are the ones that are grouped.

    Raises:
      UserError: the devices cannot be grouped like this.
    """
    what = f"{count} {platform} {'chip' if platform == 'tpu' else 'device'}{'s' if count > 1 else ''}"
    valid = [n for n in range(1, count + 1) if count % n == 0 and (platform != "tpu" or n in _TPU_BOUNDS)]
    if size not in valid:
        raise UserError(
            f"--devices_per_run={size}: this host has {what}; valid: {', '.join(map(str, valid))}"
        )
    if platform == "cpu":
        return [{"JAX_NUM_CPU_DEVICES": str(size)}] * (count // size)
    limit = "TPU_VISIBLE_CHIPS" if platform == "tpu" else "CUDA_VISIBLE_DEVICES"
    given = environment.get(limit, "").split(",") if environment.get(limit) else map(str, range(count))
    names = [name.strip() for name in given][:count]
    parts = [",".join(names[i : i + size]) for i in range(0, count, size)]
    if platform != "tpu":
        return [{limit: part} for part in parts]
    # As jax's own tests of several processes on one host, but each process is a slice of its own.
    return [
        {
            limit: part,
            "TPU_VISIBLE_DEVICES": part,  # the older name
            "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[size],
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_ADDRESSES": f"localhost:{_TPU_PORT + index}",
            "TPU_PROCESS_PORT": str(_TPU_PORT + index),
            "CLOUD_TPU_TASK_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        for index, part in enumerate(parts)
    ]


def check_seen(size: int) -> None:
    """Checks that this process sees `size` devices.

    Raises:
      UserError: it sees more or fewer, so that it may share them with others.
    """
    platform, count = seen()
    if count != size:
        raise UserError(
            f"--devices_per_run={size}: expected {size} devices, but this process sees {count} "
            f"{platform} devices"
        )
