"""Latency as a budget: milliseconds of a token and of a prompt at batch 1, by a model fitted to measurements.

The model is a sum: every feature of a shape is some work in its unit, and its coefficient is the time that a
unit takes, which is never negative. The coefficients are those of one device, of one program and of one type
of weights. Nothing here measures, see `experiments.latency`.

Letters as in `model/__init__.py`; a prompt has half as many tokens as the cache has slots.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from mobilellm_jax.config import DTYPE_BYTES, ModelConfig
from mobilellm_jax.errors import UserError, did_you_mean
from mobilellm_jax.parameters import declared

TIMES = ("decode_ms", "prefill_ms")
_SHAPES_FOR_EACH = 2  # shapes for each coefficient, at least


def features(time: str, config: ModelConfig, slots: int) -> dict[str, float]:
    """The work behind one of `TIMES`, by name, which has its unit.

    A token reads the blocks in the order of the plan, the head, and the keys and values of all slots, filled
    or not; then the largest logit is looked for. A block that is used again at once may still be in a cache
    of the processor: its bytes have a coefficient of their own. A prompt multiplies with every block as often
    as it is applied.
    """
    L, T, width = config.effective_depth, slots // 2, DTYPE_BYTES[config.compute_dtype]
    of_block = sum(
        math.prod(p.unstacked_shape(config)) for p in declared(config) if p.stack and p.kind == "matrix"
    )
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    head = width * config.vocab_size * config.width / 1e6
    if time == "prefill_ms":
        return {
            "prompts": 1.0,
            "layers": float(L),
            "MB of blocks": L * width * of_block / 1e6,
            "MB of the head": head,
            "GFLOP of products": 2 * T * L * of_block / 1e9,
            "GFLOP of attention": 4 * T * slots * L * N * H / 1e9,
            "millions of scores": L * N * T * slots / 1e6,
        }
    reads = sum(1 for _ in itertools.groupby(config.plan))
    return {
        "tokens": 1.0,
        "layers": float(L),
        "MB of blocks": reads * width * of_block / 1e6,
        "MB of blocks used again at once": (L - reads) * width * of_block / 1e6,
        "MB of the head": head,
        "thousands of logits": config.vocab_size / 1e3,
        "MB of keys and values": 2 * L * K * slots * H * width / 1e6,
        "thousands of scores": L * N * slots / 1e3,
    }


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted time.

    Attributes:
      coefficients: milliseconds for a unit of each feature, at least 0.
      ranges: smallest and largest value of each feature over the shapes measured.
      errors: |predicted / measured - 1| of every sample, predicted by a fit to the other shapes alone.
    """

    coefficients: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    errors: tuple[float, ...]

    @property
    def median_error(self) -> float:
        return float(np.median(self.errors))

    def predict(self, work: Mapping[str, float]) -> float:
        return sum(self.coefficients[name] * amount for name, amount in work.items())

    def outside(self, work: Mapping[str, float]) -> list[str]:
        """Features that lie above what was measured; below it, a sum can hardly go wrong."""
        return [
            f"{name} {amount:.3g}, measured {low:.3g} to {high:.3g}"
            for name, amount in work.items()
            for low, high in [self.ranges[name]]
            if amount > high * (1 + 1e-6)
        ]


def fit(work: Sequence[Mapping[str, float]], times: Sequence[float], shapes: Sequence[Hashable]) -> Fit:
    """Fits the coefficients, by least squares of relative errors under which none is negative.

    Args:
      work: `features` of each sample.
      times: measured milliseconds, positive.
      shapes: of each sample; the samples of one shape are left out together for `Fit.errors`.

    Raises:
      UserError: there are too few shapes for the coefficients.
    """
    names = list(work[0]) if work else []
    least = _SHAPES_FOR_EACH * len(names)
    if not work or len(set(shapes)) < least:
        raise UserError(
            f"latency: {len(set(shapes))} shapes for {len(names)} coefficients; measure at least {least}"
        )
    amounts = np.array([[of[name] for name in names] for of in work])
    measured = np.array(times)
    errors = np.empty(len(times))
    for shape in set(shapes):
        left_out = np.array([other == shape for other in shapes])
        solution = _solve(amounts[~left_out], measured[~left_out])
        errors[left_out] = np.abs(amounts[left_out] @ solution / measured[left_out] - 1)
    return Fit(
        dict(zip(names, map(float, _solve(amounts, measured)), strict=True)),
        {
            name: (float(min(column)), float(max(column)))
            for name, column in zip(names, amounts.T, strict=True)
        },
        tuple(map(float, errors)),
    )


def _solve(amounts: np.ndarray, times: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls  # here: a sweep without latency does not need it

    relative = amounts / times[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1.0  # a feature that no shape has
    return nnls(relative / scale, np.ones(len(times)))[0] / scale


@dataclasses.dataclass(frozen=True)
class Latency:
    """Predicts the latency of a shape on one device.

    Attributes:
      fits: by type of the weights, by name of the time.
      weights: the type that is predicted for; None: the compute dtype of the model.
    """

    fits: Mapping[str, Mapping[str, Fit]]
    weights: str | None = None

    def predict(self, config: ModelConfig, slots: int) -> dict[str, float]:
        """Milliseconds of a token with a cache of `slots`, and of a prompt of half as many tokens.

        Raises:
          UserError: the type of the weights was not measured.
        """
        return {time: of.predict(features(time, config, slots)) for time, of in self._of(config).items()}

    def outside(self, config: ModelConfig, slots: int) -> list[str]:
        """What of this shape lies outside of the shapes measured, by feature of a token or a prompt."""
        found = [
            line
            for time, of in self._of(config).items()
            for line in of.outside(features(time, config, slots))
        ]
        return list(dict.fromkeys(found))

    def median_errors(self, config: ModelConfig) -> dict[str, float]:
        return {time: of.median_error for time, of in self._of(config).items()}

    def _of(self, config: ModelConfig) -> Mapping[str, Fit]:
        kind = self.weights or config.compute_dtype
        if kind not in self.fits:
            raise UserError(
                f"latency: weights in {kind!r} were not measured; {did_you_mean(kind, self.fits)}"
            )
        return self.fits[kind]
