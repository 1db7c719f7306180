"""Memory check of a compiled training step, before it runs."""

import re
from pathlib import Path

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError


def check_fits(step: jax.stages.Compiled, config: Config, trials: int = 1) -> None:
    """Compares the compiler's memory estimate of a step of `trials` runs with the memory of a device.

    Nothing is checked where the compiler has no estimate or the size of the memory is unknown.

    Raises:
      UserError: the step needs more memory than there is; the message lists the settings that lower it.
    """
    analysis, has = step.memory_analysis(), device_bytes()
    if analysis is None or has is None:
        return
    state = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary = analysis.temp_size_in_bytes
    needs, room = state + temporary, has - state
    if needs <= has:
        return
    if trials > 1:
        raise UserError(
            f"a training step of {trials} runs in one program needs {_gb(needs)} of memory on each device, "
            f"but only {_gb(has)} are available; take at most {max(1, trials * has // needs)} at a time"
        )
    t, length = config.train, config.data.sequence_length
    rows = t.batch_size // t.accumulation_steps
    advice = []
    if rows > 1 and room > 0:
        # Takes all temporary memory for activations, which is close when a step does not fit.
        parts = next((n for n in range(2, rows) if rows % n == 0 and temporary / n <= room), rows)
        steps = parts * t.accumulation_steps
        advice.append(f"smaller micro-batches, {rows} rows now (train.accumulation_steps={steps} or more)")
    if rows > 1 and room <= 0:  # the batch alone is too large
        advice.append(f"a train.batch_size below {t.batch_size:,}")
    if config.model.remat != "full":
        advice.append(f"model.remat={'dots' if config.model.remat == 'none' else 'full'}")
    advice += [f"a data.sequence_length below {length}", "more devices with mesh.fsdp"]
    raise UserError(
        f"a training step needs {_gb(needs)} of memory on each device ({_gb(state)} for parameters, "
        f"optimizer state and batch), but only {_gb(has)} are available; to lower it: {'; '.join(advice)}"
    )


def device_bytes() -> int | None:
    """Bytes that one device may use; simulated CPU devices share the machine's. None if unknown."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = _machine_bytes() if device.platform == "cpu" else None
    return None if machine is None else machine // jax.local_device_count()


def _machine_bytes() -> int | None:
    """Bytes of memory of this machine, or of the container's limit if lower; None off Linux."""
    found = []
    for path, pattern, unit in (
        ("/proc/meminfo", r"MemTotal: *(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
    ):
        content = Path(path).read_text() if Path(path).is_file() else ""
        found += [int(number) * unit for number in re.findall(pattern, content)]
    return min(found, default=None)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
