"""Numbers as readers see them: scores, bounds, intervals and p-values."""

import math

from mobilellm_jax.analysis.statistics import Estimate, PairedDifference


def format_score(value: float, metric: str) -> str:
    """Returns a loss in nats per token with four decimals, an error in percent with two."""
    return f"{value:.4f}" if metric == "loss" else f"{100 * value:.2f}"


def format_bound(value: float, metric: str) -> str:
    """Returns two digits, rounded up to stay a bound: 0.0123 -> "0.013"; of an error, percentage "points"."""
    value = value if metric == "loss" else 100 * value
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value else 1.0
    return f"{math.ceil(value / step - 1e-9) * step:.6g}" + ("" if metric == "loss" else " points")


def format_estimate(estimate: Estimate, metric: str) -> str:
    """Returns "3.1234 ± 0.0012", or the mean alone; an error as exact match in percent."""
    mean = estimate.mean if metric == "loss" else 1 - estimate.mean
    half = "" if estimate.half_width is None else f" ± {format_score(estimate.half_width, metric)}"
    return format_score(mean, metric) + half


def format_difference(difference: PairedDifference, metric: str) -> str:
    """Returns "+0.0120 [-0.0010, +0.0250]", or the first number alone; of an error, percentage points."""
    scale, digits = (1, 4) if metric == "loss" else (100, 2)
    mean, low, high = (
        v if v is None else scale * v for v in (difference.mean, difference.low, difference.high)
    )
    return f"{mean:+.{digits}f}" + ("" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def format_p(p: float | None) -> str:
    """Returns "= 0.012" or "< 0.001"."""
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"
