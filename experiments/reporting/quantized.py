"""Tables of what quantization costs the designs of a study."""

from experiments.reporting.tables import Columns, quantity
from mobilellm_jax.analysis.quantized import MARGIN, MARGIN_8, gap_pairs, gaps
from mobilellm_jax.analysis.statistics import Difference, Estimate
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.wording import format_p

GAPS = (
    "Loss of the quantized model minus that of the same model in full precision, nats per token, ± a 95 % t "
    "interval over the seeds; a scheme is w<bits>a<bits of activations>:<group>. Bytes are those of all "
    "weights, beside full precision in float32. Same token: share of positions whose most probable next "
    "token stays the same."
)
PAIRS = (
    "Differences of these gaps: below 0, the first design is the less fragile one. The intervals hold for "
    f"all pairs of a scheme at once. A difference matters from {MARGIN_8:g} on with weights of 8 bits, and "
    f"from {MARGIN:g} on with fewer."
)


def costs(study: Study) -> Columns:
    """One row for each scheme and point; {} if no run was quantized."""
    found = gaps(study.points)
    if not found:
        return {}
    return {
        "point": [of.point for of in found],
        "scheme": [of.scheme for of in found],
        "gap": [_estimate(of.gap) for of in found],
        "seeds": [str(of.gap.n) for of in found],
        "loss": [f"{of.loss:.4f}" for of in found],
        "bytes": [quantity(of.bytes) for of in found],
        "of full": [f"{of.bytes / of.full_bytes:.1%}" for of in found],
        "same token": [f"{of.agreement:.1%}" for of in found],
    }


def pairs(study: Study) -> Columns:
    """One row for each scheme and pair; {} if no run was quantized, or no pair asked about."""
    found = gap_pairs(study.points, study.facts.pairs)
    if not found:
        return {}
    return {
        "pair": [f"{of.point} against {of.other}" for of in found],
        "scheme": [of.scheme for of in found],
        "difference of gaps": [_difference(of.difference) for of in found],
        "p": [
            ""
            if of.difference is None or of.difference.p_value is None
            else format_p(of.difference.p_value).removeprefix("= ")
            for of in found
        ],
        "finding": [of.word for of in found],
    }


def _estimate(of: Estimate) -> str:
    return f"{of.mean:+.4f}" + ("" if of.half_width is None else f" ± {of.half_width:.4f}")


def _difference(of: Difference | None) -> str:
    if of is None:
        return ""
    interval = "" if of.low is None or of.high is None else f" [{of.low:+.4f}, {of.high:+.4f}]"
    return f"{of.mean:+.4f}{interval}"
