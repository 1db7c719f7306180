"""The arms of a study: the parameterizations that all of its designs are run under."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from configs.base import Study
from experiments.runner.points import Point
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError


def by_arm(points: Sequence[Point]) -> dict[tuple[str, str, str | None], list[Point]]:
    """Points by study, preset and arm."""
    arms: dict[tuple[str, str, str | None], list[Point]] = {}
    for point in points:
        arms.setdefault(point.arm, []).append(point)
    return arms


def base_shapes(points: Sequence[Point]) -> tuple[str, ...]:
    """Lines about arms whose base shape is that of none of their designs."""
    lines = []
    for of_arm in by_arm(points).values():
        models = [p.config.model for p in of_arm if p.config.model.parameterization != "standard"]
        deep = any(model.parameterization == "completep" for model in models)
        base = {(m.base_depth if deep else None, m.base_width) for m in models}
        shapes = {(m.effective_depth if deep else None, m.width) for m in models}
        if models and not base & shapes:
            depth, width = min(base, key=str)
            said = f"{depth} x {width}" if deep else f"width {width}"
            study, preset, arm = of_arm[0].arm
            lines.append(
                f"warning: {study}:{preset}{f', {arm}' if arm else ''}: no design has the base shape {said}, "
                "at which the learning rate and init of the config apply as given"
            )
    return tuple(lines)


def check_asked(spec: str, study: Study, asked: Sequence[str]) -> None:
    """Raises UserError for the name of an arm that the study does not have."""
    for name in asked if study.arms else ():
        if name not in study.arms:
            raise UserError(f"--arms={name}: {spec} has no such arm; valid: {', '.join(study.arms)}")


def check_differ(spec: str, study: Study, of_arms: Sequence[Sequence[Config]]) -> None:
    """Raises UserError for two arms under which every design is the same computation.

    At the base shape, mup and completep are standard (`model/parameterization.py`).
    """
    for (one, here), (other, there) in combinations(zip(study.arms, of_arms, strict=False), 2):
        if all(_computed(a) == _computed(b) for a, b in zip(here, there, strict=True)):
            raise UserError(
                f"--config={spec}: the arms {one!r} and {other!r} are the same, as every design has the base "
                "shape; name one arm, or set another model.base_depth or model.base_width"
            )


def _computed(config: Config) -> Config:
    """The config as `standard` where it computes the same, whatever it is called."""
    model = config.model
    wide = model.width == model.base_width
    deep = model.effective_depth == model.depth == model.base_depth
    is_standard = {"standard": True, "mup": wide, "completep": wide and deep}[model.parameterization]
    own = {"parameterization": "standard", "base_depth": model.depth, "base_width": model.width}
    return replace(config, model=replace(model, **own)) if is_standard else config
