"""Losses of n-grams: what counting gives on the rows that a model is trained on, a floor for its own loss.

Letters: R rows of S = T + 1 tokens, V vocabulary. Contexts are the tokens of the row alone. Ids that are
input only, see `rows.py`, are context and no targets: of conversations, replies are counted.
"""

import numpy as np
from jaxtyping import Float, Int

from mobilellm_jax.data.rows import is_target

MOST_TOKENS = 100_000_000  # a run of more has no floor; in proportion, so many take 100 s and 6 GB
VERSION = 1  # raise it when the same rows would give other losses
_BUCKETS = 64


def ngram_losses(
    train: Int[np.ndarray, "R S"],
    tuning: Int[np.ndarray, "Q S"],
    rows: Int[np.ndarray, "P S"],
    vocab_size: int,
) -> dict[str, int | float]:
    """Counts n-grams in rows [R, S] of `train` and evaluates them on `rows`, in nats per token.

    Each order is interpolated with the one below, down to uniform (Jelinek and Mercer 1980). The share of the
    higher order depends on how often its context was seen, in powers of 2. Shares are fitted by EM on the
    `tuning` rows; without any, with counts of the first nine tenths of `train` on its last tenth. 20 million
    tokens take 20 s and 1.1 GB.

    Keys: "tokens" (counted), "unigram", "bigram", "trigram".
    """
    cut = max(1, len(train) * 9 // 10)
    counted, tuning = (train, tuning) if len(tuning) else (train[:cut], train[cut:])
    losses: dict[str, int | float] = {"tokens": int(np.sum(is_target(train[:, 1:])))}
    is_fit, is_scored = is_target(tuning[:, 1:]), is_target(rows[:, 1:])
    p_fit, p = (np.full(part.shape, 1 / vocab_size) for part in (is_fit, is_scored))
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        counts = _Counts(train, order, vocab_size)
        fit_counts = counts if counted is train else _Counts(counted, order, vocab_size)
        higher_fit, bucket_fit = fit_counts.conditional(tuning)
        share = _shares(higher_fit[is_fit], p_fit[is_fit], bucket_fit[is_fit])
        p_fit += share[bucket_fit] * (higher_fit - p_fit)
        higher, bucket = counts.conditional(rows)
        p += share[bucket] * (higher - p)
        losses[name] = float(-np.mean(np.log(p[is_scored])))
    return losses


class _Counts:
    """Occurrences of the n-grams of one order, whose last tokens are targets, and of their contexts."""

    def __init__(self, rows: np.ndarray, order: int, vocab_size: int) -> None:
        self._order, self._vocab_size = order, vocab_size
        keys = self._keys_of(rows)
        keys = keys[is_target(rows[:, rows.shape[1] - keys.shape[1] :])]  # one name, as they are large
        self._keys, self._counts = np.unique(keys, return_counts=True)
        self._contexts, first = np.unique(self._keys // vocab_size, return_index=True)
        self._context_counts = np.add.reduceat(self._counts, first) if len(first) else first

    def _keys_of(self, rows: np.ndarray) -> Int[np.ndarray, "R E"]:
        """Every n-gram as one number, int64, at the last E places of a row, which have one."""
        tokens, first = np.where(is_target(rows), rows, ~rows), max(self._order, 2)
        keys = np.zeros((len(rows), rows.shape[1] + 1 - first), np.int64)
        for back in range(self._order, 0, -1):
            keys *= self._vocab_size
            keys += tokens[:, first - back : rows.shape[1] + 1 - back]
        return keys

    def conditional(
        self, rows: Int[np.ndarray, "R S"]
    ) -> tuple[Float[np.ndarray, "R T"], Int[np.ndarray, "R T"]]:
        """Relative frequency of each token after its context, and the bucket of the context's count."""
        keys = self._keys_of(rows)
        seen = _look_up(self._contexts, self._context_counts, keys // self._vocab_size)
        p = _look_up(self._keys, self._counts, keys) / np.maximum(seen, 1)
        without = (
            (0, 0),
            (rows.shape[1] - 1 - keys.shape[1], 0),
        )  # the first target has no two tokens before
        return np.pad(p, without), np.pad(np.frexp(seen)[1], without)


def _look_up(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Count of each wanted key, 0 where there is none; `keys` are sorted, and there is one at least."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, counts[place], 0)


def _shares(higher: np.ndarray, lower: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    """The share of `higher` in the mixture with `lower`, for each bucket; 0 for contexts never seen."""
    total, share = np.bincount(bucket, minlength=_BUCKETS), np.full(_BUCKETS, 0.5)
    share[0] = 0
    for _ in range(30):
        part = share[bucket] * higher
        posterior = part / (part + (1 - share[bucket]) * lower)
        share = (np.bincount(bucket, posterior, _BUCKETS) + 1) / (total + 2)  # one imagined target each
        share[0] = 0
    return share
