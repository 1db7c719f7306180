"""What a sweep says before its first run: parameterizations, size, horizon, and how often a text is seen."""

import pytest
from test_sweep import losses, points, with_arms, write_study

from experiments.runner import plans, sweeping
from experiments.runner.flags import DEFAULT_STUDY
from experiments.runner.studies import points_of
from mobilellm_jax import data

BLOCK = 4 * 16 * 16 + 3 * 16 * 16 + 2 * 16  # attention, feed-forward, norms of the study of test_sweep
SIZE = 2 * BLOCK + 16
TOKENS = 4 * 8 * 16


def said(chosen, tmp_path, monkeypatch, capsys):
    """Lines of a sweep in which nothing trains."""
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    assert sweeping.sweep(chosen, tmp_path / "w", jobs=1) == 0
    return capsys.readouterr().out.splitlines()


def test_the_first_line_says_parameterization_size_and_horizon(tmp_path, monkeypatch, capsys):
    chosen = points(write_study(tmp_path))
    first, *_ = said(chosen, tmp_path, monkeypatch, capsys)
    assert first == (
        f"mini:tiny: under standard; {SIZE:,} non-embedding parameters, "
        f"{TOKENS / SIZE:.2g} training tokens for each"
    )


def test_designs_of_several_sizes_and_arms_have_a_range(tmp_path, monkeypatch, capsys):
    study = with_arms(write_study(tmp_path))
    text = study.read_text().replace('model__sharing=("none", "reverse")', "model__depth=(2, 3)")
    text = text.replace("(1, 2)", "(1, 1)").replace('["model.sharing"]', '["model.depth"]')
    study.write_text(
        text.replace('baseline="none"', 'baseline="2"').replace("tolerance=0.0", "tolerance=0.5")
    )
    first, *_ = said(points(study), tmp_path, monkeypatch, capsys)
    large = SIZE + BLOCK
    assert first == (
        f"mini:tiny: under completep and standard; {SIZE:,} to {large:,} non-embedding parameters, "
        f"{TOKENS / large:.2g} to {TOKENS / SIZE:.2g} training tokens for each"
    )


def test_the_sweep_without_flags_says_its_regime_first():
    chosen = plans.with_power(points_of(DEFAULT_STUDY, {}, None, ()))
    names = dict.fromkeys(f"{p.facts['study']}:{p.facts['preset']}" for p in chosen)
    lines = plans.lines(chosen, {}, {})
    assert len(names) > 1
    first = {name: next(line for line in lines if line.startswith(name)) for name in names}
    for name, line in first.items():
        assert line.startswith(f"{name}: under completep; "), line
        assert line.endswith(" training tokens for each"), line
    assert lines[0] in first.values()


@pytest.mark.parametrize("steps", [4, 200])
def test_a_text_that_is_seen_more_than_once_is_said(tmp_path, monkeypatch, capsys, steps):
    chosen = points(write_study(tmp_path), {"train.steps": steps})
    lines = said(chosen, tmp_path, monkeypatch, capsys)
    config = chosen[0].config
    tokens = data.prepare(config.data, config.model.vocab_size).card["splits"]["train"]["tokens"]
    times = steps * 8 * 16 / tokens
    assert (times > 1) == (steps == 200)
    warned = f"mini:tiny: the text has {tokens / 1e6:.2g} M tokens and is seen {times:.2g} times"
    assert ([warned] if times > 1 else []) == [line for line in lines if " is seen " in line]
