"""What a study may compare: name, unit, and how readers see it. Lower is better for all of them.

A share of failures is shown as the share of successes, "exact match, %"; its differences stay as they are.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One key of the evaluations of a record.

    Attributes:
      what: what is measured, for sentences.
      axis, column: label of its axis, and head of its column, in the direction that readers see.
      of_differences, column_of_differences: the same, of differences.
      unit, unit_of_mean: of a difference, and of a mean, for sentences.
      caption: what the numbers are, above their table.
      is_share: from 0 to 1; written in percent, as its complement.
    """

    what: str
    axis: str
    column: str
    of_differences: str
    column_of_differences: str
    unit: str
    unit_of_mean: str
    caption: str
    is_share: bool = False

    @property
    def scale(self) -> int:
        """What a difference is multiplied with before it is written."""
        return 100 if self.is_share else 1

    @property
    def digits(self) -> int:
        """Decimals of what is written."""
        return 2 if self.is_share else 4

    @property
    def suffix(self) -> str:
        """After the size of a difference."""
        return " points" if self.is_share else ""

    def shown(self, value: float) -> float:
        """A value as readers see it: 100 percent is perfect."""
        return 100 * (1 - value) if self.is_share else value


def _share(wrong: str, axis: str, column: str, unit: str, caption: str) -> Measure:
    return Measure(
        what=wrong,
        axis=axis,
        column=column,
        of_differences=f"{wrong} (percentage points)",
        column_of_differences=f"{wrong}, points",
        unit=f"percentage points of {unit}",
        unit_of_mean="%",
        caption=caption,
        is_share=True,
    )


_INTERVAL = "± a 95 % t interval."
MEASURES: dict[str, Measure] = {
    "loss": Measure(
        what="loss",
        axis="held-out loss (nats per token)",
        column="loss (nats/token)",
        of_differences="loss (nats per token)",
        column_of_differences="nats/token",
        unit="nats per token",
        unit_of_mean="nats per token",
        caption=f"Held-out loss after the last step, {_INTERVAL}",
    ),
    "error": _share(
        "error",
        "exact match, held out (%)",
        "exact match, %",
        "exact match",
        f"Held-out answers that are exactly right after the last step, in percent, {_INTERVAL}",
    ),
    "wrong": _share(
        "wrong answers",
        "right answers, mean over levels (%)",
        "right, %",
        "right answers",
        f"Held-out answers that are right after the last step, in percent, mean over levels, {_INTERVAL}",
    ),
    "wrong_calls": _share(
        "calls not right",
        "whole calls right, held out (%)",
        "calls right, %",
        "whole calls",
        f"Held-out calls that greedy decoding gets wholly right after the last step, in percent, {_INTERVAL}",
    ),
    "log_divergence": Measure(
        what="log divergence",
        axis="divergence from the grammar (ln of nats per token)",
        column="ln divergence (nats/token)",
        of_differences="ln divergence",
        column_of_differences="ln divergence",
        unit="natural logarithms of the divergence (0.69: half or twice as far from the grammar)",
        unit_of_mean="ln nats per token",
        caption=f"Logarithm of the divergence from the grammar after the last step, {_INTERVAL}",
    ),
    "forgotten": _share(
        "facts not stored",
        "facts stored (%)",
        "facts stored, %",
        "all bits",
        f"Bits of the facts that the model has stored after the last step, in percent of all, {_INTERVAL}",
    ),
}
