"""How many runs of a point train in one program (`--trials_per_program`), and which of them."""

from collections.abc import Iterator, Mapping, Sequence

import jax

from experiments.runner.costs import memory_bytes
from experiments.runner.points import Point, Run
from mobilellm_jax.errors import UserError
from mobilellm_jax.training import memory

_AUTO_SHARE = 0.8  # of the memory that "auto" fills: the estimate is wrong by up to a fifth


def trials_of(point: Point, asked: int | None, jobs: int = 1) -> int:
    """The most runs of a point that train in one program.

    Args:
      point: of the sweep.
      asked: their number; None, for "auto", takes 1 on CPUs and on several devices, else as many as fit into
        the memory of the device.
      jobs: processes that share the memory of a CPU.

    Raises:
      UserError: so many do not fit, or the runs cannot train in one program.
    """
    if asked == 1:
        return 1
    loops, devices, has = point.config.train.loops, jax.device_count(), memory.device_bytes()
    on_cpu = jax.default_backend() == "cpu"
    if asked is None:
        if on_cpu or loops or devices > 1 or has is None:
            return 1
        return _fitting(point, int(_AUTO_SHARE * has))
    flag = f"--trials_per_program={asked}: {point.facts['point']!r}"
    if jax.process_count() > 1:
        raise UserError(f"{flag} is trained by {jax.process_count()} processes together; use 1")
    if loops:
        raise UserError(f"{flag} draws its numbers of loops (train.loops={loops!r}), run by run; use 1")
    if has is not None:
        has = has * devices // (jobs if on_cpu else 1)
        if asked > (most := _fitting(point, has)):
            needs = f"about {_bytes(point, asked) / 1e9:,.1f} GB, and there are {has / 1e9:,.1f}"
            raise UserError(f"{flag} needs {needs}; use at most {most}")
    return asked


def _fitting(point: Point, size: int) -> int:
    """How many runs of a point fit into `size` bytes; at least 1."""
    one = _bytes(point, 1)
    return 1 + max(0, size - one) // (_bytes(point, 2) - one)


def _bytes(point: Point, runs: int) -> int:
    """Estimated bytes of training and, where evaluation compares answers, of its logits of all positions."""
    c = point.config
    logits = 4 * c.train.eval_batch_size * c.data.sequence_length * c.model.vocab_size
    return memory_bytes(point, runs) + (runs * logits if c.data.has_answers else 0)


def parts(runs: Sequence[Run], most: int) -> Iterator[tuple[Mapping[int, Run], int]]:
    """Cuts runs into parts that train one after the other, each with the number of places of its program.

    All parts have the same number of places, of which the last ones may be empty in the last part.
    """
    count = -(-len(runs) // -(-len(runs) // most)) if runs else 1
    for start in range(0, len(runs), count):
        yield dict(enumerate(runs[start : start + count])), count
