"""Compilation: seconds and memory against the number of blocks, and against how often each is applied.

The layers are one scan over the plan, so compilation should not grow with it. Blocks are 128 wide; the
persistent compilation cache is disabled. Memory is what the compiler allocates for a step in addition to its
arguments.
"""

from collections.abc import Callable

import jax

from experiments.benchmarks import measure as m
from experiments.benchmarks.shapes import config_of
from mobilellm_jax.runs.run import check
from mobilellm_jax.training.programs import make_programs

_DEPTHS = (4, 12, 30, 62)
_REPEATS = (1, 2, 4)


def measure(quick: bool) -> list[m.Line]:
    """Measures seconds to compile a training step, memory, and the ratio of the deepest to the shallowest."""
    depths, repeats = (_DEPTHS[:2], _REPEATS[:2]) if quick else (_DEPTHS, _REPEATS)
    plans: dict[str, dict[str, object]] = {f"{depth} blocks": {"depth": depth} for depth in depths}
    plans |= {
        f"12 blocks, each applied {times} times": {"depth": 12, "sharing": "immediate", "num_repeats": times}
        for times in repeats[1:]
    }
    memory: dict[str, float] = {}

    def compile_step(name: str, fields: dict[str, object]) -> Callable[[], None]:
        config = config_of("12 x 128", 8, 128, quick, scan_unroll=1, **fields)

        def call() -> None:
            jax.clear_caches()
            compiled = make_programs(config, check(config)).trace_step().lower().compile()
            analysis = compiled.memory_analysis()
            memory[name] = analysis.temp_size_in_bytes / 1e6 if analysis else float("nan")

        return call

    seconds = m.alternate(
        {name: compile_step(name, fields) for name, fields in plans.items()}, 1 if quick else 5
    )
    lines = [m.Line(f"{name}: compile", "s", tuple(times)) for name, times in seconds.items()]
    few, many = f"{depths[0]} blocks", f"{depths[-1]} blocks"
    ratio = m.ratios(seconds[many], seconds[few])
    lines.append(m.Line(f"{many} / {few}: compile", "x", ratio, at_most=1.3))
    return lines + [m.Line(f"{name}: memory of a step", "MB", (size,)) for name, size in memory.items()]
