"""Tables of synthetic records: what they show in the terminal, as Markdown and as CSV."""

import csv
import dataclasses
import io
import json

import pytest
from test_results import make_diverged, make_record, make_tuning

from experiments.reporting import tables
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.analysis.wording import phrase

JITTER = {0: 0.0, 1: 0.013, 2: -0.008}
PAIRS = [["4 x 128", "2 x 128"], ["8 x 128", "4 x 128"]]


def depths(**changes):
    changes = {"pairs": PAIRS, **changes}
    records = []
    for i, (depth, loss) in enumerate({2: 3.62, 4: 3.55, 8: 3.53}.items()):
        records += make_tuning(depth=depth, score=loss, **changes)
        records += [
            make_record(depth=depth, seed=seed, score=loss + jitter * (1 + 0.3 * i), **changes)
            for seed, jitter in JITTER.items()
        ]
    return records


def text(records):
    return tables.text(study_of(records))


def rows_of(table: str, header: str) -> list[list[str]]:
    """Returns the cells of the terminal's table whose first line holds `header`, split at two spaces."""
    block = next(part for part in table.split("\n\n") if header in part.splitlines()[0])
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in block.splitlines()]


def test_facts_equal_for_all_points_stand_above_the_tables():
    lines = " ".join(text(depths()).split("\n\n")[0].split())
    assert lines == (
        "Does depth or width help more? Held equal: non-embedding parameters, within 0.1%. Learning rate: "
        "tuned for each point. Smallest difference that matters: 0.02 nats per token. The same for all "
        "points: "
        "width 128, heads 4, kv heads 2, ffn 256, tokens 2.05 M, embedding parameters 250 k, train FLOPs per "
        "token 6.3 M, inference FLOPs per token 2.1 M."
    )
    exactly = [
        dataclasses.replace(r, budgets={**r.budgets, "non_embedding_parameters": 750_000}) for r in depths()
    ]
    assert "Held equal: non-embedding parameters, exactly." in text(exactly)


def test_every_budget_is_shown_with_its_mismatch_and_the_matched_one_marked():
    header, *rows = rows_of(text(depths()), "KV B")
    assert header == ["point", "params", "non-embed *", "KV B", "decode B", "optim B", "activ B"]
    assert rows[0] == ["2 x 128", "1 M", "750 k", "1.02 k", "4 M", "16 M", "8.2 M"]
    assert rows[-1] == ["mismatch", "0.0%", "0.0%", "300.0%", "0.0%", "0.0%", "7.3%"]
    assert rows_of(text(depths()), "blocks") == [
        ["point", "blocks", "layers", "D/L"],
        ["2 x 128", "2", "2", "64"],
        ["4 x 128", "4", "4", "32"],
        ["8 x 128", "8", "8", "16"],
    ]


def test_outcomes_hold_rate_sensitivity_interval_noise_and_counts():
    records = depths()
    records[-1] = make_diverged(depth=8, seed=2, pairs=PAIRS)
    found = study_of(records).verdict
    header, first, _, last = rows_of(text(records), "sensitivity")
    assert header == [
        "point",
        "learning rate",
        "sensitivity",
        "loss (nats/token)",
        "bits/byte",
        "noise (sd)",
        "finished",
        "diverged",
    ]
    half = found.estimates["2 x 128"].half_width
    assert first == [
        "2 x 128",
        "0.002",
        "+0.0300",
        f"3.6217 ± {half:.4f}",
        f"{0.51 * (3.62 + 0.005 / 3):.4f}",
        "0.0106",
        "3/3",
        "0",
    ]
    assert last[-2:] == ["2/3", "1"]


def test_edges_and_divergence_beside_the_optimum_are_marked():
    rates = {0.001: 3.6, 0.002: 3.5}
    runs = [make_record(learning_rate=r, score=s, phase="tuning", pairs=[]) for r, s in rates.items()]
    assert rows_of(text(runs), "sensitivity")[1] == ["4 x 128", "0.002 (edge)", "+0.1000", "none", "0/0"]
    runs.append(make_diverged(learning_rate=0.004, phase="tuning", pairs=[]))
    assert rows_of(text(runs), "sensitivity")[1][1:3] == ["0.002", "diverges"]
    assert tables.outcomes(study_of(runs[-1:]))["learning rate"] == ["none (edge)"]


def test_every_pair_has_its_difference_interval_p_and_verdict():
    records = depths()
    found = study_of(records).verdict
    header, *rows = rows_of(text(records), "p, all pairs")
    assert header == ["pair", "seeds", "difference (nats/token)", "p, all pairs", "verdict"]
    for row, c in zip(rows, found.comparisons, strict=True):
        d = c.difference
        assert row == [
            f"{c.point} against {c.other}",
            "3",
            f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]",
            "< 0.001" if d.p_value < 0.001 else f"{d.p_value:.3f}",
            phrase(c, "loss"),
        ]
    assert "all pairs" not in text(depths(pairs=[]))


def test_error_is_shown_as_exact_match():
    records = [
        make_record(depth=d, seed=s, score=d / 10 + j, metric="error")
        for d in (2, 4)
        for s, j in enumerate((0, 0.1, 0.2))
    ]
    table = text(records)
    assert rows_of(table, "exact match, %")[1][1:4] == ["0.002", "70.00 ± 24.84", "10.00"]
    assert "bits/byte" not in table
    assert rows_of(table, "difference (error, points)")[1][2] == "+20.00"
    assert "Smallest difference that matters: 2 points." in " ".join(table.split())


def test_one_point_has_all_its_budgets():
    table = text([make_record(pairs=[])])
    header, row = rows_of(table, "KV B")
    assert len(header) == len(row) == 1 + len(make_record().budgets)
    assert "mismatch" not in table


def test_tables_fit_a_terminal():
    records = [make_record(depth=d, seed=s, score=3.5 + 0.01 * s * d) for d in (2, 4) for s in range(3)]
    budgets = {"train_flops_per_token", "inference_flops_per_token", "embedding_parameters"}
    records = [
        dataclasses.replace(
            r, budgets={k: v + 1e5 * r.point_index if k in budgets else v for k, v in r.budgets.items()}
        )
        for r in records
    ]
    assert max(map(len, text(records).splitlines())) <= 120


def test_csv_holds_every_number_of_a_point():
    records = depths()
    records[0] = dataclasses.replace(records[0], created="2025")
    study = study_of(records)
    found = study.verdict
    first, _, last = csv.DictReader(io.StringIO(tables.csv_text(study)))
    assert (first["point"], last["point"]) == ("2 x 128", "8 x 128")
    assert float(first["score_mean"]) == found.estimates["2 x 128"].mean
    assert float(first["score_sd_over_seeds"]) == found.noise["2 x 128"]
    assert json.loads(last["score_of_seed"]) == {"0": 3.53, "1": 3.53 + 0.013 * 1.6, "2": 3.53 - 0.008 * 1.6}
    assert json.loads(first["learning_rate_curve"])[-1] == [0.008, None]
    assert (first["runs_finished"], first["runs_diverged"], first["tokens_seen"]) == ("3", "0", "2048000")
    assert {name: float(first[name]) for name in records[0].budgets} == records[0].budgets


def test_csv_of_pairs():
    records = depths()
    study = study_of(records)
    found = study.verdict
    lines = list(csv.DictReader(io.StringIO(tables.comparisons_csv(study))))
    assert [(line["point"], line["other"]) for line in lines] == [tuple(pair) for pair in PAIRS]
    for line, c in zip(lines, found.comparisons, strict=True):
        assert float(line["difference"]) == c.difference.mean
        assert float(line["difference_low"]) == c.difference.low
        assert float(line["p_value_all_pairs"]) == c.p_value
        assert (line["verdict"], line["phrase"]) == (c.word, phrase(c, "loss"))
    only = [make_record()]
    (line,) = csv.DictReader(io.StringIO(tables.comparisons_csv(study_of(only))))
    assert (line["seeds"], line["difference"], line["verdict"]) == ("0", "", "cannot tell")


def test_markdown_escapes_the_column_separator():
    assert tables.markdown_table({"point": ["a|b"]}).endswith("\n| a\\|b |")


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (12, "12"), (999.9, "1 k"), (2_048_000, "2.05 M"), (999_600, "1 M"), (6.3e18, "6.3 E")],
)
def test_quantity(number, shown):
    assert tables.quantity(number) == shown


def accuracy(acc, acc_norm, items=100):
    values = {"acc": acc, "acc_norm": acc_norm}
    metrics = {name: {"value": value, "standard_error": 0.05} for name, value in values.items()}
    return {"items": items, "metrics": metrics, "chance": 0.25, "majority": 0.266, "data": "x.jsonl"}


def test_accuracies_are_means_over_the_seeds_of_equal_questions():
    assert tables.zero_shot(study_of(depths())) is None
    tasks = [{"piqa": accuracy(0.5, 0.6), "boolq": accuracy(0.7, 0.7)}, {"piqa": accuracy(0.6, 0.8)}]
    records = [make_record(depth=2, seed=seed, zero_shot=found) for seed, found in enumerate(tasks)]
    records += [make_record(depth=4, zero_shot={"piqa": accuracy(0.1, 0.2, items=9)})]
    records += [run for run in depths() if run.x["value"] == 8]
    columns = tables.zero_shot(study_of(records))
    assert columns == {
        "point": ["2 x 128", "4 x 128", "chance", "majority"],
        "boolq (100)": ["70.0 / 70.0", "", "25.0", "26.6"],
        "piqa (100)": ["55.0 / 70.0", "", "25.0", "26.6"],
        "piqa (9)": ["", "10.0 / 20.0", "25.0", "26.6"],
        "average": ["", "", "", ""],
    }
    whole = [make_record(depth=d, zero_shot=tasks[0]) for d in (2, 4)]
    columns = tables.zero_shot(study_of(whole))
    assert columns is not None
    assert columns["average"][:2] == ["60.0 / 65.0"] * 2
