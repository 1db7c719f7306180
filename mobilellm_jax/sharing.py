"""Layer sharing: a model is a stack of blocks (weights) and a layer plan (the order they are applied in).

With `num_repeats` fixed, parameters and FLOPs are equal across the three sharing strategies; only the
order differs. To add a strategy, add one function to `STRATEGIES`: everything else (parameter counts,
the forward pass, the sweeps) follows from the plan.
"""

import collections
import re

from mobilellm_jax.errors import UserError, did_you_mean

LayerPlan = tuple[int, ...]
MAX_LAYERS = 10_000  # a plan is a tuple: a mistyped depth must not exhaust the memory


def _immediate(depth: int, num_repeats: int) -> LayerPlan:
    """Each block runs `num_repeats` times in a row: 0 0 1 1 2 2 (the paper: immediate block-wise sharing)."""
    return tuple(block for block in range(depth) for _ in range(num_repeats))


def _repeat_all(depth: int, num_repeats: int) -> LayerPlan:
    """The whole stack runs `num_repeats` times: 0 1 2 0 1 2 (the paper's repeat-all-over sharing)."""
    return tuple(range(depth)) * num_repeats


def _reverse(depth: int, num_repeats: int) -> LayerPlan:
    """Every second pass through the stack runs backwards: 0 1 2 2 1 0 (the paper's reverse sharing)."""
    forward = tuple(range(depth))
    return tuple(b for i in range(num_repeats) for b in (forward if i % 2 == 0 else forward[::-1]))


STRATEGIES = {
    "none": lambda depth, num_repeats: tuple(range(depth)),
    "immediate": _immediate,
    "repeat_all": _repeat_all,
    "reverse": _reverse,
}

LOOPED = tuple(name for name in STRATEGIES if name != "none")  # those in which `num_repeats` has a meaning


def loop_counts(loops: str, sharing: str, num_repeats: int) -> tuple[int, ...]:
    """Numbers of loops that `train.loops` names: "1..4" is 1, 2, 3, 4; "" is none.

    Raises:
      UserError: it is no range, the sharing strategy has no loops, or `num_repeats` is not in the range.
    """
    if not loops:
        return ()
    match = re.fullmatch(r"([1-9]\d{0,3})\.\.([1-9]\d{0,3})", loops)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"train.loops: {loops!r} is not a range; expected one such as '1..4', or ''")
    if sharing not in LOOPED:
        raise UserError(
            f"train.loops: {loops!r} has no meaning with model.sharing={sharing!r}; "
            f"use one of {', '.join(LOOPED)}"
        )
    if not int(match[1]) <= num_repeats <= int(match[2]):
        raise UserError(
            f"train.loops: {loops!r} does not hold model.num_repeats={num_repeats}, with which the run is "
            "evaluated and its multipliers are made; change one of them"
        )
    return tuple(range(int(match[1]), int(match[2]) + 1))


def uses_of(plan: LayerPlan) -> tuple[int, ...]:
    """How often the block of each layer was applied before it: 0 0 0 1 1 0 for the plan 0 1 2 1 2 3."""
    seen: collections.Counter[int] = collections.Counter()
    found = []
    for block in plan:
        found.append(seen[block])
        seen[block] += 1
    return tuple(found)


def loop_starts(plan: LayerPlan) -> tuple[bool, ...]:
    """Where loops begin: at layers 1 and 3 for the plan 0 1 2 1 2 3, at every layer for 0 0 1 1.

    That is at a block that is applied several times, where the layer before it is of another loop, or of a
    block that is applied once.
    """
    times, uses = collections.Counter(plan), uses_of(plan)
    loops = [use if times[block] > 1 else None for block, use in zip(plan, uses, strict=True)]
    before = [None, *loops[:-1]]
    return tuple(loop is not None and loop != last for loop, last in zip(loops, before, strict=True))


def fixed_scales(loop_scale: str, uses: int) -> tuple[float, ...]:
    """The numbers of `model.loop_scale`, one for each use of a block; () for "" and "learned".

    Raises:
      UserError: it is something else, or there are more or fewer of them.
    """
    if loop_scale in ("", "learned"):
        return ()
    try:
        found = tuple(map(float, loop_scale.split()))
    except ValueError:
        found = ()
    if len(found) != uses or not all(0 < number < 1e6 for number in found):
        raise UserError(
            f"model.loop_scale: {loop_scale!r} is not valid; expected '', 'learned', or a positive number "
            f"for each use of a block, of which the plan has {uses}, such as "
            f"{' '.join(f'{1 / (use + 1):.2g}' for use in range(uses))!r}"
        )
    return found


def layer_plan(sharing: str, depth: int, num_repeats: int) -> LayerPlan:
    """Expands a sharing strategy to the order in which blocks are applied (MobileLLM section 2.3, figure 6).

    Args:
      sharing: a name in `STRATEGIES`, or an explicit plan: block indices separated by spaces, "0 1 2 1 2 3".
      depth: number of distinct blocks.
      num_repeats: times each block is applied; 1 with "none" and with an explicit plan.

    Returns:
      Block indices, one for each layer applied; `len(plan)` is the effective depth.

    Raises:
      UserError: an unknown strategy, repeats where they have no meaning, an explicit plan that names a block
        that does not exist or leaves one out, or more than `MAX_LAYERS` layers.
    """
    for field, layers in (("model.depth", depth), ("model.num_repeats", depth * num_repeats)):
        if layers > MAX_LAYERS:
            raise UserError(f"{field}: {layers:,} layers are too many; at most {MAX_LAYERS:,} can be applied")
    if sharing in STRATEGIES:
        if sharing == "none" and num_repeats != 1:
            raise UserError(
                f"model.num_repeats: {num_repeats} has no meaning with model.sharing='none'; "
                f"use num_repeats=1, or one of {', '.join(LOOPED)}"
            )
        return STRATEGIES[sharing](depth, num_repeats)
    words = sharing.split()
    if not words or not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        raise UserError(
            f"model.sharing: unknown strategy {sharing!r}; {did_you_mean(sharing, STRATEGIES)} "
            "(or an explicit plan of block indices, such as '0 1 2 1 2 3')"
        )
    if len(words) > MAX_LAYERS:
        raise UserError(
            f"model.sharing: a plan of {len(words):,} layers is too long; "
            f"at most {MAX_LAYERS:,} can be applied"
        )
    plan = tuple(int(word) for word in words)
    if num_repeats != 1:
        raise UserError(
            f"model.num_repeats: {num_repeats} has no meaning with the explicit plan "
            f"model.sharing={sharing!r}; write the repeats into the plan and use num_repeats=1"
        )
    if set(plan) != set(range(depth)):
        raise UserError(
            f"model.sharing: the plan {sharing!r} must use every block from 0 to {depth - 1} "
            f"(model.depth={depth}) and no other"
        )
    return plan
