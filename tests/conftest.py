"""What all tests share: 8 simulated CPU devices, types and shapes checked on every call, tiny models.

JAX_PLATFORMS is set before jax is imported, so that no test touches an accelerator. Importing
`mobilellm_jax` through the hooks makes beartype check every annotation of the library, and jaxtyping the
array shapes in them.
"""

import functools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Without it jaxlib makes as many threads as devices; a collective blocks one of them for each device, and
# was once seen to wait for ever for a participant that had none left.
os.environ.setdefault("PJRT_NPROC", "16")

import jax
import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_package
from commands import ROOT

from configs import base

# Compile tiny programs fast, rather than to run fast. The second flag saves the most; jax 0.12 has lost it.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if jax.__version_info__[:2] == (0, 10):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    # A machine that stands still for 40 s is no reason to abort.
    os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=200"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_cpu_enable_async_dispatch", False)  # one program at a time, for the same reason
jax.config.update("jax_numpy_rank_promotion", "raise")
# jaxtyping binds the arguments of each call to their names, which took most of the time of tests that count:
# its hook is for the modules with shapes alone.
WITH_SHAPES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "mobilellm_jax").rglob("*.py")
    if "from jaxtyping import" in path.read_text()
]
beartype_package("mobilellm_jax", conf=BeartypeConf(claw_is_pep526=False))
jaxtyping.install_import_hook(WITH_SHAPES, "beartype.beartype")

from mobilellm_jax import model  # noqa: E402, after the hook
from mobilellm_jax.config import Config, ModelConfig, from_config_dict  # noqa: E402
from mobilellm_jax.training import loop  # noqa: E402

# A process keeps the programs of its last run; runs of tests come back to the same few, 1 to 2 s each.
loop.compile_programs = functools.cache(loop.compile_programs.__wrapped__)

# Where a shell started the tests in the background, they ignore Ctrl-C, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup it is SIGHUP. A handler is not inherited, so what they start hears it.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# Sizes differ wherever they may, so that swapped axes cannot pass unseen.
_TINY = {
    "model.remat": "none",
    "model.vocab_size": 48,
    "model.depth": 2,
    "model.width": 24,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 10,
    "model.ffn_width": 32,
    "model.loss_chunk": 4,
    "data.sequence_length": 9,
    "optimizer.warmup_steps": 2,
    "train.steps": 10,
    "train.batch_size": 8,
    "train.eval_batch_size": 8,
}
BATCH, LENGTH = 8, 9  # the same in most tests, so that they share compiled programs
# Every strategy and an explicit plan, with equally many blocks; all but the first apply four layers.
SHARING = [
    {"sharing": "none"},
    {"sharing": "immediate", "num_repeats": 2},
    {"sharing": "repeat_all", "num_repeats": 2},
    {"sharing": "reverse", "num_repeats": 2},
    {"sharing": "0 1 0 0"},
]
_LONGEST = [
    "sweep",
    "train",
    "parameterization",
    "processes",
    "docs",
    "soak",
    "trials",
    "slurm",
    "devices",
    "lowering",
    "bench",
    "report",
    "scaling",
    "cli",
]
FFN_KINDS = ["swiglu", "relu", "gelu"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: xdist runs a file on one worker, and the last one would run alone."""
    order = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the largest of the figures, {name: number}, that tests handed to `record_property`."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    figures: dict[str, list[float]] = {}
    for report in reports:
        for name, value in dict(report.user_properties).get("figures", {}).items():
            figures.setdefault(name, []).append(value)
    for name, values in figures.items():
        terminalreporter.write_line(f"{name}: at most {max(values):.2g} in {len(values)} tests")


init = jax.jit(model.init, static_argnums=1)
apply = jax.jit(model.apply, static_argnums=2)
loss_and_gradients = jax.jit(jax.value_and_grad(model.loss, has_aux=True), static_argnums=3)


def tiny_config(**overrides: Any) -> Config:
    """Returns a tiny run with overrides of dotted fields: `tiny_config(**{"model.depth": 3})`."""
    return from_config_dict(base.update(base.get_config(), {**_TINY, **overrides}))


def tiny_model(**overrides: Any) -> ModelConfig:
    """Returns a tiny model with overrides of its fields: `tiny_model(depth=3)`."""
    return tiny_config(**{f"model.{name}": value for name, value in overrides.items()}).model


def shapes(config: ModelConfig) -> Any:
    """Returns the shapes of all parameters; nothing is allocated."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), config))


def random_params(config: ModelConfig) -> Any:
    """Returns float32 parameters in NumPy, with attention far from uniform and gains far from 1."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        low, high = (0.5, 1.5) if path[-1].key == "gain" else (-0.5, 0.5)
        return rng.uniform(low, high, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes(config))


def random_batch(config: ModelConfig, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and targets; about a fifth of the targets are negative, to be ignored."""
    rng = np.random.default_rng(1)
    tokens_BT, targets_BT = rng.integers(0, config.vocab_size, (2, BATCH, length), dtype=np.int32)
    return tokens_BT, np.where(rng.random((BATCH, length)) < 0.2, -1, targets_BT)


def flipped(content: bytes, bit: int) -> bytes:
    """Returns `content` with one bit flipped."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk here: {mount.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yields every equation, those of nested programs included, with the number of times it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            value = getattr(value, "jaxpr", value)  # of a closed program
            if hasattr(value, "eqns"):
                yield from equations(value, inner)


def dot_flops(jaxpr: Any) -> int:
    """Returns the FLOPs of all matrix products: 2 for each element of the result and contracted index."""
    flops = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            flops += 2 * times * int(np.prod(out)) * int(np.prod([lhs[axis] for axis in contracted]))
    return flops


def assert_trees_close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Compares each array with an error relative to the largest entry of the expected one."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(b).max(), 1e-30)
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance, err_msg=str(path))
