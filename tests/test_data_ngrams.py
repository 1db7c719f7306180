"""n-gram losses against counts in dictionaries, and against what is known of a source."""

import math
from collections import Counter

import numpy as np
import pytest

from mobilellm_jax.data.ngrams import ngram_losses

V = 7


def chain(rows, seed):
    """Rows of 9 tokens, in which a token depends on the two before it."""
    rng = np.random.default_rng(seed)
    found = np.zeros((rows, 9), np.int32)
    for row in found:
        for t in range(9):
            expected = (row[t - 1] + 2 * row[t - 2] + 1) % V if t > 1 else 0
            row[t] = expected if rng.random() < 0.7 else rng.integers(V)
    return found


def reference(train, tuning, rows):
    """The same with dictionaries: probabilities one by one, 30 rounds of EM; ~id is context only."""
    if not len(tuning):
        cut = max(1, len(train) * 9 // 10)
        counted, tuning = train[:cut], train[cut:]
    else:
        counted = train

    def read(part):
        return [([max(i, ~i) for i in row], [i >= 0 for i in row]) for row in part.tolist()]

    def counts(part, order):
        grams = Counter()
        for row, is_target in read(part):
            for t in range(max(1, order - 1), len(row)):
                grams[tuple(row[t - order + 1 : t + 1])] += is_target[t]
        contexts = Counter()
        for gram, count in grams.items():
            contexts[gram[:-1]] += count
        return grams, contexts

    def terms(part, grams, contexts, order):
        for row, is_target in read(part):
            for t in filter(is_target.__getitem__, range(1, len(row))):
                gram = tuple(row[t - order + 1 : t + 1]) if t >= order - 1 else ()
                seen = contexts[gram[:-1]] if gram else 0
                yield (grams[gram] / seen if seen else 0.0), seen.bit_length()

    losses = []
    p_fit, p = ([1 / V] * int((part[:, 1:] >= 0).sum()) for part in (tuning, rows))
    for order in (1, 2, 3):
        fit = list(terms(tuning, *counts(counted, order), order))
        share = dict.fromkeys({bucket for _, bucket in fit}, 0.5)
        for _ in range(30):
            responsible = Counter()
            for (q, bucket), lower in zip(fit, p_fit, strict=True):
                s = share[bucket] if bucket else 0
                responsible[bucket] += s * q / (s * q + (1 - s) * lower)
            total = Counter(bucket for _, bucket in fit)
            share = {bucket: (responsible[bucket] + 1) / (total[bucket] + 2) for bucket in total}

        def mixed(found, below, share=share):
            shares = [share.get(bucket, 0.5) if bucket else 0 for _, bucket in found]
            return [s * q + (1 - s) * low for s, (q, _), low in zip(shares, found, below, strict=True)]

        p_fit, p = mixed(fit, p_fit), mixed(list(terms(rows, *counts(train, order), order)), p)
        losses.append(-sum(map(math.log, p)) / len(p))
    return losses


@pytest.mark.parametrize("tuned", [0, 20])
@pytest.mark.parametrize("trained", [1, 15, 60])
@pytest.mark.parametrize("prompts", [False, True])
def test_losses_are_those_of_dictionaries(trained, tuned, prompts):
    train, tuning, rows = chain(trained, 0), chain(tuned, 1), chain(30, 2)
    if prompts:  # of other tokens, as long as two in three rows
        for part in (train, tuning, rows):
            part[1::3, :4] = ~(part[1::3, :4] // 2)
            part[2::3, 2:6] = ~(part[2::3, 2:6] // 2)
    found = ngram_losses(train, tuning, rows, V)
    assert found.pop("tokens") == np.sum(train[:, 1:] >= 0)
    assert list(found) == ["unigram", "bigram", "trigram"]
    np.testing.assert_allclose(list(found.values()), reference(train, tuning, rows), rtol=1e-12)


def test_the_trigram_finds_the_entropy_of_its_source():
    found = ngram_losses(chain(4000, 0), chain(300, 1), chain(1000, 2), V)
    right = 0.7 + 0.3 / V
    entropy = -right * math.log(right) - (V - 1) * 0.3 / V * math.log(0.3 / V)
    # Of 8 targets, the first has one token before it.
    first_extra = (math.log(V) - entropy) / 8
    assert found["trigram"] == pytest.approx(entropy + first_extra, abs=0.06)
    assert found["trigram"] < found["bigram"] < found["unigram"] + 1e-3
    assert found["unigram"] == pytest.approx(math.log(V), abs=0.1)


def test_tokens_that_were_never_counted_have_a_finite_loss():
    train, rows = np.zeros((3, 9), np.int32), np.full((2, 9), 6, np.int32)
    found = ngram_losses(train, train[:0], rows, V)
    assert all(math.log(V) < found[name] < 10 for name in ("unigram", "bigram", "trigram"))
