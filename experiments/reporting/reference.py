"""The reference of the config, from its dataclasses and `configs/base.py`; the picture of layer plans."""

import dataclasses
import inspect
import re
import typing

from configs import base
from mobilellm_jax.config import ROLES, Config
from mobilellm_jax.sharing import STRATEGIES, layer_plan

_GROUPS = {
    "model": "Shape and arithmetic of the model.",
    "data": "Text, tokenizer and rows.",
    "optimizer": "Optimizer and its schedule.",
    "train": "Length of a run, and when it evaluates, saves and logs.",
    "mesh": "How devices are arranged; the product of the three is the number of devices.",
}


def configuration() -> str:
    """Tables of all fields by group, in the order of `base.py`: name, default, meaning, and its reason."""
    parts, source = [], inspect.getsource(base.get_config)
    for group in dataclasses.fields(Config):
        types = typing.get_type_hints(typing.get_type_hints(Config)[group.name])
        names = sorted(types, key=lambda name: source.index(f"    {group.name}.{name} = "))
        rows = [
            f"| `{group.name}.{name}`<br>{_default(f'{group.name}.{name}', types[name])} "
            f"| {_meaning(f'{group.name}.{name}')} |"
            for name in names
        ]
        head = ["| field and default | meaning |", "|---|---|"]
        parts += [f"## {group.name}", _GROUPS[group.name], "\n".join([*head, *rows])]
    return "\n\n".join(parts)


def _default(dotted: str, kind: type) -> str:
    group, name = dotted.split(".")
    value = base.get_config()[group][name]
    return f"{kind.__name__}, derived" if value is None else f"`{value!r}`"


def _meaning(dotted: str) -> str:
    role = ROLES[dotted]
    lines = re.escape(dotted)
    reason = re.search(rf"^    {lines} = .*?  # (.*)$", inspect.getsource(base.get_config), re.MULTILINE)
    said = [_sentence(role.doc), *([f"Default: {_sentence(reason[1])}"] if reason else [])]
    return " ".join(said) + " *May change on resume.*" * role.resumable


def _sentence(text: str) -> str:
    return f"{re.sub(' ?[|] ?', ', ', text).replace('<', '&lt;').rstrip('.')}."


_BOX, _GAP, _ROW, _LEFT, _TOP = 44, 6, 58, 128, 34
_COLORS = ("#0072b2", "#e69f00", "#009e73")  # of Okabe and Ito, told apart by the colour-blind
_INK = ("#ffffff", "#000000", "#ffffff")


def layer_plans(depth: int = 3, num_repeats: int = 2) -> str:
    """Draws the plan of each sharing strategy as SVG, one box for each layer applied."""
    plans = {name: layer_plan(name, depth, 1 if name == "none" else num_repeats) for name in STRATEGIES}
    width = _LEFT + depth * num_repeats * (_BOX + _GAP) + 180
    height = _TOP + len(plans) * _ROW
    font = 'font-family="system-ui, sans-serif"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" {font} font-size="15">',
        f"<title>Layer plans of {depth} blocks; equal colours are equal weights</title>",
        f'<text x="{_LEFT}" y="18" fill="#7a7a7a">layers applied, from input to output</text>',
    ]
    for row, (name, plan) in enumerate(plans.items()):
        y = _TOP + row * _ROW
        middle = y + _BOX / 2 + 5
        parts.append(
            f'<text x="{_LEFT - 14}" y="{middle}" text-anchor="end" fill="#7a7a7a" '
            f'font-family="ui-monospace, monospace">{name}</text>'
        )
        for i, block in enumerate(plan):
            x = _LEFT + i * (_BOX + _GAP)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_BOX}" rx="6" fill="{_COLORS[block % 3]}"/>'
                f'<text x="{x + _BOX / 2}" y="{middle}" text-anchor="middle" fill="{_INK[block % 3]}">'
                f"{block}</text>"
            )
        x = _LEFT + len(plan) * (_BOX + _GAP) + 8
        parts.append(f'<text x="{x}" y="{middle}" fill="#7a7a7a">{depth} blocks, {len(plan)} layers</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
