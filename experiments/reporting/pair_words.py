"""What the pairs of the playground are about, in words that hold for every ability."""

from collections.abc import Iterable

from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.study import Study

STUDY = "playground"  # its presets are <ability>_<size>
_ORDER = ("structure", "manipulation", "knowledge", "hops", "breadth")


def by_size(studies: Iterable[Study]) -> dict[str, dict[str, Study]]:
    """Studies of the playground by size, then by ability; sizes with a single ability are left out."""
    found: dict[str, dict[str, Study]] = {}
    for study in studies:
        ability, _, size = study.facts.preset.rpartition("_")
        if study.facts.study == STUDY and ability:
            found.setdefault(size, {})[ability] = study
    return {size: dict(sorted(of.items(), key=_place)) for size, of in found.items() if len(of) > 1}


def _place(of_ability: tuple[str, Study]) -> int:
    return _ORDER.index(of_ability[0]) if of_ability[0] in _ORDER else len(_ORDER)


def roles(point: Point, other: Point, with_arm: bool = True) -> str:
    """What the pair is about, in words that hold for every ability, with the arm if it is not the first."""
    arm = f" ({point.arm})" if with_arm and point.arm and point.arm != "completep" else ""
    blocks, applied = len(set(point.layer_plan)), len(point.layer_plan)
    if applied == blocks:
        shape = "more, thinner" if applied > len(other.layer_plan) else "fewer, wider"
        return f"{shape} blocks{arm}"
    first = f"{_number(blocks)} {_times(applied // blocks)}, {point.config['model']['sharing']}"
    if len(other.layer_plan) == applied:
        second = f"{_number(applied)} once"
    else:
        second = "once, for as many FLOPs" if _steps(other) > _steps(point) else "once"
    return f"{first}, against {second}{arm}"


def _number(blocks: int) -> str:
    return f"{blocks} block{'' if blocks == 1 else 's'}"


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


def _steps(point: Point) -> int:
    return point.config["train"]["steps"]
