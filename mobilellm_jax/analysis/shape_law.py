"""The law of size, shape, repeats and horizon: its forms, and the losses that they say.

    loss = E + A N_eff^-alpha exp(kappa ln(D/L / a)^2) + B T^-beta,  N_eff = N_once + r^phi N_rec

loss: held out, nats per token; N_once, N_rec: non-embedding parameters of blocks applied once and r times;
D: width; L: layers applied; a: the best D/L; T: training tokens. With phi = 0 a repeat is worth nothing, with
1 as much as a new block; the factor r^phi is that of arXiv 2604.21106, which measured 0.46. Other forms let a
and kappa depend on N or T, or have shape as a term of its own.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mobilellm_jax.analysis.cells import Cell

N0, T0 = 1e5, 1e6  # parameters and tokens at which the two decreasing terms are stated
# Lowest, highest: no data within a laptop's reach ask for more.
BOUNDS = {
    "E": (0.0, 10.0),
    "log_A": (-8.0, 3.0),
    "alpha": (0.01, 2.0),
    "log_B": (-8.0, 3.0),
    "beta": (0.01, 2.0),
    "kappa": (-0.5, 1.0),
    "log_a": (math.log(0.5), math.log(1000.0)),
    "drift": (-2.0, 2.0),
    "drift_T": (-2.0, 2.0),
    "kappa_T": (-0.5, 0.5),
    "phi": (-3.0, 4.0),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the law.

    Attributes:
      shape: how the aspect ratio enters: as a factor on the term of size ("times"), the same with log a
        linear in log N ("drifts"), or with log a and kappa linear in log T ("tokens"), as a term of its own
        ("plus"), or not at all.
      repeats: an exponent for each "order", one "common", or fixed: 0 (a repeat is worth nothing), 1 (a new
        block).
    """

    name: str
    shape: Literal["times", "drifts", "tokens", "plus", "none"] = "times"
    repeats: Literal["order", "common", 0, 1] = "order"


LAW = Form("one best D/L")
# One of these is used, that which predicts sizes left out best; all leave what a repeat is worth open.
SHAPES = (
    LAW,
    Form("best D/L drifts with log N", shape="drifts"),
    Form("best D/L and curvature drift with log T", shape="tokens"),
    Form("shape as a term of its own", shape="plus"),
)
NO_SHAPE = Form("no effect of shape", shape="none")
FORMS = (
    *SHAPES,
    NO_SHAPE,
    Form("one exponent for all orders", repeats="common"),
    Form("a repeat is worth nothing (phi = 0)", repeats=0),
    Form("a repeat is worth a block (phi = 1)", repeats=1),
)


class _Parts(NamedTuple):
    """Losses and what they are made of, each [cells].

    Attributes:
      loss, by_size, by_tokens: nats; the last two are the decreasing terms.
      size: log(N_eff / N0).
      off: log(D/L) minus the best.
      scale: derivative of the loss by kappa off^2.
      by_phi, by_a: derivatives of the loss by phi, and by log a.
    """

    loss: np.ndarray
    by_size: np.ndarray
    by_tokens: np.ndarray
    size: np.ndarray
    off: np.ndarray
    scale: np.ndarray
    by_phi: np.ndarray
    by_a: np.ndarray


class Model:
    """Losses and their derivatives by the free constants, for one form and one list of cells."""

    def __init__(
        self, form: Form, cells: Sequence[Cell], values: Mapping[str, float], free: Sequence[str]
    ) -> None:
        self.form, self.values, self.free = form, values, free
        self.log_n = np.log([cell.parameters / N0 for cell in cells])
        self.log_t = np.log([cell.tokens / T0 for cell in cells])
        self.aspect = np.log([cell.aspect for cell in cells])
        self.phi = [_phi(form, cell.order) for cell in cells]
        times = sorted({uses for cell in cells for uses in cell.uses})
        self.times = np.array(times, float)
        self.shares = np.array([[cell.uses.count(n) / len(cell.uses) for n in times] for cell in cells])

    def _parts(self, theta: np.ndarray) -> _Parts:
        v = {**self.values, **dict(zip(self.free, theta, strict=True))}
        phi = np.array([v[name] for name in self.phi])
        worth = self.shares * self.times ** phi[:, None]  # of blocks, by the times that they are applied
        off = self.aspect - v["log_a"] - v["drift"] * self.log_n - v["drift_T"] * self.log_t
        size = self.log_n + np.log(worth.sum(1))
        is_factor = self.form.shape != "plus"
        kappa = v["kappa"] + v["kappa_T"] * self.log_t
        bend = kappa * off**2
        by_size = np.exp(v["log_A"] - v["alpha"] * size + (bend if is_factor else 0))
        by_tokens = np.exp(v["log_B"] - v["beta"] * self.log_t)
        scale = by_size if is_factor else np.ones_like(by_size)
        loss = v["E"] + by_size + by_tokens + (0 if is_factor else bend)
        by_phi = -v["alpha"] * by_size * (worth @ np.log(self.times)) / worth.sum(1)
        by_a = -2 * kappa * off * scale
        return _Parts(loss, by_size, by_tokens, size, off, scale, by_phi, by_a)

    def __call__(self, theta: np.ndarray) -> np.ndarray:
        return self._parts(theta).loss

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """[cells, free constants]."""
        of = self._parts(theta)
        columns = {
            "E": np.ones_like(of.loss),
            "log_A": of.by_size,
            "alpha": -of.size * of.by_size,
            "log_B": of.by_tokens,
            "beta": -self.log_t * of.by_tokens,
            "kappa": of.off**2 * of.scale,
            "kappa_T": of.off**2 * of.scale * self.log_t,
            "log_a": of.by_a,
            "drift": of.by_a * self.log_n,
            "drift_T": of.by_a * self.log_t,
        }
        for name in self.free:
            if name.startswith("phi"):
                columns[name] = of.by_phi * [name == mine for mine in self.phi]
        return np.stack([columns[name] for name in self.free], axis=1)


def _phi(form: Form, order: str) -> str:
    return f"phi {order}" if form.repeats == "order" else "phi"
