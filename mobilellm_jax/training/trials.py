"""Several runs in one program: their arrays on a leading axis of trials, by place from 0.

A run alone has no such axis. A place without a run, or whose run is over, is computed all the same, from rows
without targets, and read by nobody: what a place computes does not depend on the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import COMPILED, Config, flatten, to_dict
from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.programs import Programs
from mobilellm_jax.training.step import TrainState

# Not `compiled`, but of one teacher there is one copy in the program.
_SHARED = ("train.teacher", "train.teacher_weight", "train.teacher_temperature")


def check_same_program(configs: Sequence[Config]) -> None:
    """Checks that runs can train in one program.

    Raises:
      UserError: they differ in a field that changes it, or each step has a program of its own.
    """
    if len(configs) < 2:
        return
    first, *others = ({**flatten(to_dict(c)), "data.has_answers": c.data.has_answers} for c in configs)
    for other in others:
        for name in sorted(first):
            changes = name in COMPILED or name in _SHARED or name == "data.has_answers"
            if changes and first[name] != other[name]:
                raise UserError(
                    f"{name}: {first[name]!r} in one run and {other[name]!r} in another of one program, "
                    "which it changes; train them one by one, or give both the same value"
                )
    if loops := first["train.loops"]:
        raise UserError(
            f"train.loops: {loops!r} draws a number of loops for each step of each run, and every number has "
            "a program of its own; train these runs one by one"
        )


def stack(programs: Programs, states: Iterator[tuple[int, TrainState]]) -> TrainState:
    """One state of all trials from places and states of runs, taken one after the other; zeros elsewhere."""
    if programs.trials == 1:
        return next(states)[1]
    shapes = programs.of_trials(programs.state)
    stacked = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
    for place, state in states:
        stacked = programs.put(stacked, state, place)
    return stacked


def state_of(programs: Programs, stacked: TrainState, place: int) -> TrainState:
    """The state of one run, as it is saved."""
    return stacked if programs.trials == 1 else programs.pick(stacked, place)


def place_rows(
    programs: Programs, like: jax.ShapeDtypeStruct, rows: Mapping[int, Int[np.ndarray, "b S"]]
) -> Array:
    """Puts this process's rows of each run on the devices; places without a run get rows without targets.

    Args:
      programs: those of the runs.
      like: `programs.rows` or `programs.eval_rows`.
      rows: by place.
    """
    if programs.trials == 1:
        return jax.make_array_from_process_local_data(like.sharding, rows[0])
    stacked = np.full((programs.trials, *next(iter(rows.values())).shape), PADDING, np.int32)
    for place, of_run in rows.items():
        stacked[place] = of_run
    return jax.make_array_from_process_local_data(programs.of_trials(like).sharding, stacked)


def rates_of(programs: Programs, rates: Mapping[int, np.float32]) -> np.float32 | Float[np.ndarray, "N"]:
    """The learning rates of all trials, 0 in places without a run; of a run alone, its own."""
    if programs.trials == 1:
        return rates[0]
    return np.array([rates.get(place, 0.0) for place in range(programs.trials)], np.float32)


def of_place(values: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The part of one run in arrays [trials, ...]."""
    return {name: value[place] for name, value in values.items()}
