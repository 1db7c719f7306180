"""Communication between devices in a program, counted in the HLO text after XLA's partitioner.

The partitioner is the same for all kinds of devices, so that no real ones are needed: the program is compiled
for as many simulated CPU devices as the mesh has. Later passes of the compiler for a TPU or GPU are not
included: they merge small collectives, move some out of loops, and replace an all-reduce of which every
device keeps its part only by a reduce-scatter.
"""

import collections
import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})\((?P<rest>.*)")
_WHILE = re.compile(r" while\(.*condition=%(?P<condition>[\w.\-]+), body=%(?P<body>[\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind among equally many devices, in one run of a program.

    Attributes:
      kind: XLA's name: "all-reduce", "all-gather", ...
      among: number of devices that take part in each.
      count: number of executions; a collective in a loop counts once per iteration.
      array_bytes: bytes of the arrays they reduce, gather or scatter, on one device.
      sent_bytes: bytes that one device sends for them in a ring algorithm.
    """

    kind: str
    among: int
    count: int
    array_bytes: int
    sent_bytes: int


def partitioned_text(lowered: Any) -> str:
    """Compiles `lowered` for CPU devices and reads the HLO text of the partitioned program of one device.

    "" for a program on one device, which is not partitioned.
    """
    with tempfile.TemporaryDirectory() as directory:
        options = {
            "xla_backend_optimization_level": 0,  # the program will not run
            "xla_dump_to": directory,
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_pass_re": "spmd-partitioning",
        }
        # A program from the persistent cache is not partitioned again, and would dump no text.
        cached = jax.config.values["jax_enable_compilation_cache"]
        try:
            _use_cache(False)
            lowered.compile(compiler_options=options)
        finally:
            _use_cache(cached)
        files = sorted(Path(directory).glob("*after_spmd-partitioning*.txt"))
        return files[-1].read_text() if files else ""


def _use_cache(use: bool) -> None:
    """Enables or disables JAX's persistent compilation cache; JAX reads the setting once, until a reset."""
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()


def count_collectives(text: str) -> list[Collective]:
    """Counts the collectives in a program's text, sorted by bytes sent, most first.

    Raises:
      ValueError: a loop, dtype or replica group cannot be parsed.
    """
    computations = _computations(text)
    found: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for (kind, among, size), times in _executed(computations, "ENTRY") if computations else ():
        parts = 1 if kind == "collective-permute" else (among - 1) / among
        sums = found[kind, among]
        sums[0] += times
        sums[1] += times * size
        sums[2] += round(times * size * parts * (2 if kind == "all-reduce" else 1))
    return sorted((Collective(*key, *sums) for key, sums in found.items()), key=lambda c: -c.sent_bytes)


def _computations(text: str) -> dict[str, list[str]]:
    """Splits the text into the lines of every computation, by name; the main one is "ENTRY"."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith(("ENTRY ", "%")):
            name = "ENTRY" if line.startswith("ENTRY ") else line[1:].split(" ", 1)[0]
            computations[name] = []
        elif line.startswith(" "):
            computations[name].append(line)
    return computations


def _executed(
    computations: dict[str, list[str]], name: str, times: int = 1
) -> Iterator[tuple[tuple[str, int, int], int]]:
    """Yields (kind, devices, bytes of the array) of every collective, and its number of executions."""
    for line in computations[name]:
        if match := _WHILE.search(line):
            turns = _turns(match["condition"], computations[match["condition"]])
            yield from _executed(computations, match["body"], times * turns)
        elif match := _COLLECTIVE.search(line):
            kind, rest = match["kind"], match["rest"]
            among = 2 if kind == "collective-permute" else _group_size(rest)
            scattered = among if kind == "reduce-scatter" else 1  # the result is a part of the array
            yield (kind, among, scattered * _shape_bytes(match["shape"])), times
        else:
            for called in _CALLED.findall(line):
                yield from _executed(computations, called, times)


def _turns(name: str, condition: list[str]) -> int:
    """Number of iterations of a loop: JAX's loops of fixed length count from 0 up to a constant."""
    limits = re.findall(r"constant\((\d+)\)", "\n".join(condition))
    if len(limits) != 1 or "direction=LT" not in condition[-1]:
        raise ValueError(f"collectives: cannot read the length of the loop with condition {name}")
    return int(limits[0])


def _group_size(rest: str) -> int:
    """Number of devices in one of the `replica_groups`, parsed from XLA's three notations."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # 'axis' or a part of it, 'axis':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    raise ValueError(f"collectives: cannot parse the replica groups: {rest[:200]}")


def _shape_bytes(shape: str) -> int:
    """Bytes of an array "f32[2,3]{1,0}", or of a tuple of arrays."""
    total = 0
    for dtype, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape):
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"collectives: unknown size of dtype {dtype}; add it to _ITEM_BYTES")
        total += _ITEM_BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
    return total
