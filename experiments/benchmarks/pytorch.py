"""The same training step in PyTorch: Hugging Face's `LlamaForCausalLM`, eager and compiled, against ours.

Same shape, batch, precision and optimizer: AdamW, fused, with the gradient clipped; sdpa attention; the loss
as transformers computes it; all cores. On CPUs the PyTorch process also gets our setting of the C library, to
keep freed memory, which makes it faster too, and both dtypes take turns in one run. In bfloat16 its matrix
products and attention run under autocast, ours with `model.compute_dtype=bfloat16`; parameters and optimizer
are float32 in both. In float32 both let a GPU multiply in TF32. Each PyTorch variant has a process of its
own, which is idle in other turns.
On a GPU, measure this part alone: other parts do not release their memory.

  python -m experiments.benchmarks.pytorch SHAPE     # one of them: a JSON object, see `_peer`
"""

import contextlib
import functools
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, cast

import jax

from experiments.benchmarks import measure as m
from mobilellm_jax.costs import accounting
from mobilellm_jax.dtypes import cpu_flags
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.malloc import keep_freed_memory
from mobilellm_jax.training.memory import device_bytes

AGAINST = ("torch", "transformers")

# rows and tokens of a row
_CASES = {"4 x 48": (8, 64), "12 x 128": (16, 128), "125m": (2, 512)}
MODELS = tuple(_CASES)
_SIX_125M = 30e9  # bytes; 24e9 were not enough. Compiled is the faster one
_ACCELERATOR = {"4 x 48": (256, 64), "12 x 128": (256, 128), "125m": (16, 2048)}  # float32: a quarter of them


def missing() -> str:
    """Message that names the packages that are not installed; "" if all are."""
    # Not imported: PyTorch's threads and gigabytes would slow down this process.
    lacking = [name for name in AGAINST if find_spec(name) is None]
    return (
        f"pytorch: {', '.join(lacking)} not installed; install with: pip install -e '.[hf]'"
        if lacking
        else ""
    )


def measure(quick: bool) -> list[m.Line]:
    """Measures tokens per second of all sides, and the ratio of ours to PyTorch's faster one.

    Raises:
      UserError: an extra is not installed.
    """
    if reason := missing():
        raise UserError(reason)
    from experiments.benchmarks.shapes import chosen

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch some of the GPU's memory
    together = [("float32", "bfloat16")]
    if quick:
        together = [("float32",)]
    elif jax.default_backend() != "cpu":  # whose memory is too small for all of them
        together = [("float32",), ("bfloat16",)]
    names = ["4 x 48"] if quick else chosen(MODELS)
    return [line for name in names for dtypes in together for line in _compare(name, dtypes, quick)]


def _variants(name: str, quick: bool) -> tuple[str, ...]:
    """How PyTorch runs: both ways, as far as a CPU's memory holds six models of 125m that train."""
    if quick:
        return ("eager",)
    has = device_bytes() if jax.default_backend() == "cpu" else None
    is_short = name == "125m" and has is not None and has < _SIX_125M
    return ("torch.compile",) if is_short else ("eager", "torch.compile")


def _compare(name: str, dtypes: Sequence[str], quick: bool) -> Iterator[m.Line]:
    from experiments.benchmarks.shapes import STEPS, config_of
    from experiments.benchmarks.trainer import Trainer

    on_cpu = jax.default_backend() == "cpu"
    rows, length = (8, 32) if quick else (_CASES if on_cpu else _ACCELERATOR)[name]
    if not on_cpu and "float32" in dtypes:
        rows //= 4  # three processes share the memory
    steps = STEPS.get(name, 2) if on_cpu else 10
    variants = _variants(name, quick)
    with contextlib.ExitStack() as stack:
        sides: dict[tuple[str, str], Callable[[], object]] = {}
        for dtype, variant in itertools.product(dtypes, (*variants, "ours")):
            config = config_of(name, rows, length, quick, compute_dtype=dtype)
            if variant == "ours":
                trainer = Trainer(config)
                batches = trainer.random_batches()
                sides[dtype, variant] = functools.partial(trainer.train, batches, steps)
                continue
            shape = {
                "vocab_size": config.model.vocab_size,
                "hidden_size": config.model.width,
                "intermediate_size": config.model.ffn_width,
                "num_hidden_layers": config.model.depth,
                "num_attention_heads": config.model.num_heads,
                "num_key_value_heads": config.model.num_kv_heads,
                "tie_word_embeddings": config.model.share_embedding,
            }
            how = {"rows": rows, "length": length, "steps": steps, "dtype": dtype, "variant": variant}
            how["parameters"] = accounting.parameters(config.model).total
            what = json.dumps({"model": shape, **how, "cpu": on_cpu})
            sides[dtype, variant] = stack.enter_context(m.process(variant, __name__, what))
        seconds = m.alternate(sides, 2 if quick else 5)
    case = f"{name}, {rows} x {length} tokens"
    tokens = {side: m.rates(steps * rows * length, times) for side, times in seconds.items()}

    def fastest(sides: Iterable[tuple[str, str]]) -> tuple[str, str]:
        return max(sides, key=lambda side: statistics.median(tokens[side]))

    for dtype in dtypes:
        for variant in (*variants, "ours"):
            label = variant if variant == "ours" else f"PyTorch, {variant}"
            yield m.Line(f"{case}, {dtype}: {label}", "tokens/s", tokens[dtype, variant])
        peer = fastest((dtype, variant) for variant in variants)
        wanted = {("float32", True): 1.1, ("bfloat16", False): 1.3}.get((dtype, on_cpu))
        ratio = m.ratios(tokens[dtype, "ours"], tokens[peer])
        yield m.Line(f"{case}, {dtype}: ours / PyTorch, {peer[1]}", "x", ratio, at_least=wanted)
    if len(dtypes) > 1:
        ours, peer = (
            fastest(side for side in tokens if (side[1] == "ours") == is_ours) for is_ours in (True, False)
        )
        ratio = m.ratios(tokens[ours], tokens[peer])
        yield m.Line(f"{case}: ours, {ours[0]} / PyTorch, {peer[0]}", "x", ratio, at_least=1.1)
        ratio = m.ratios(tokens["bfloat16", "ours"], tokens["float32", "ours"])
        wanted = 2.0 if name == "125m" and "amx_bf16" in cpu_flags() else None
        yield m.Line(f"{case}: ours, bfloat16 / float32", "x", ratio, at_least=wanted)


def _peer(what: dict[str, Any]) -> None:
    """Trains with PyTorch: takes the steps of a turn for every line on stdin, and prints "done"."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    device = "cpu" if what["cpu"] else "cuda"
    torch.set_float32_matmul_precision("high")
    shape = {**what["model"], "use_cache": False, "max_position_embeddings": what["length"]}
    config = cast(Any, LlamaConfig)(**shape, attn_implementation="sdpa")  # its decorators hide the arguments
    model = cast(Any, LlamaForCausalLM(config)).to(device).train()
    parameters = list(model.parameters())
    assert sum(weights.numel() for weights in parameters) == what["parameters"]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if what["variant"] == "torch.compile" else model
    size = (what["rows"], what["length"])
    tokens = torch.randint(0, what["model"]["vocab_size"], size, device=device)
    for _ in sys.stdin:
        for _ in range(what["steps"]):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=what["dtype"] == "bfloat16"):
                loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        loss.item()  # pyright: ignore[reportPossiblyUnboundVariable]  # there is a step
        print("done", flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    _peer(json.loads(sys.argv[1]))
