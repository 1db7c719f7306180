"""The studies at the paper's scale against the paper's tables, row by row; the twins keep what they vary."""

import dataclasses
from decimal import Decimal

import pytest

from configs import base
from configs import paper as all_studies
from experiments.reporting import paper_tables
from experiments.runner.listing import table
from experiments.runner.studies import points_of
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting

# Rows of the tables at each preset, as the issue of the paper's tables counts them.
ROWS = {
    "roadmap": {"paper_125m": 6, "paper_350m": 6},
    "depth_vs_width": {"paper_125m": 9, "paper_350m": 10},
    "head_groups": {"paper_125m": 15, "paper_350m": 15},
    "embedding_sharing": {"paper_125m": 3},
    "layer_sharing": {"paper_125m": 4, "paper_350m": 4},
    "repeats": {"paper_125m": 4, "paper_350m": 4},
    "mobilellm": {"paper": 7},
    "followups": {"paper_smollm": 2, "paper_r1": 3},
}
STUDIES = [(study, preset, n) for study, presets in ROWS.items() for preset, n in presets.items()]
_COLUMNS = {  # of the tables, by what they hold
    "depth": ("layers", "layers_distinct", "distinct_layers"),
    "num_heads": ("heads",),
    "num_kv_heads": ("kv_heads", "kv_heads_inferred"),
    "width": ("dim",),
    "ffn_width": ("ffn_hidden",),
    "effective_depth": ("applied_layers", "layers_applied"),
}


def with_csv_rows(study, preset):
    """Yields (model config, row of the CSV) in order."""
    source = paper_tables.SOURCES[study]
    rows = [
        row
        for row in paper_tables.table(source.table)
        if source.only(row) and f"paper_{source.group(row).lower()}".strip("_") == preset
    ]
    points = points_of(f"configs/{study}.py:{preset}", {}, None, ())
    return [(point.config.model, row) for point, row in zip(points, rows, strict=True)]


@pytest.mark.parametrize(("study", "preset", "count"), STUDIES)
def test_every_row_is_a_point_with_the_printed_shape_and_size(study, preset, count):
    pairs = with_csv_rows(study, preset)
    assert len(pairs) == len(paper_tables.of_preset(study, preset)) == count
    compared = set()
    for (model, row), printed in zip(pairs, paper_tables.of_preset(study, preset), strict=True):
        for field, columns in _COLUMNS.items():
            given = [row[column] for column in columns if row.get(column)]
            assert given in ([], [str(getattr(model, field))]), (row, field)
            compared |= {field} if given else set()
        tied = {"yes": True, "no": False}[row.get("tied_embeddings") or row.get("tied") or "no"]
        assert model.share_embedding is tied, row
        assert model.ffn_kind == ("relu" if "ReLU" in row.get("ffn", "") else "swiglu"), row
        counts = accounting.parameters(model)
        count = counts.total if study == "followups" else counts.as_printed  # model cards count the gains
        assert not printed.printed or paper_tables.agrees(printed.printed, count), (row, count)
    assert compared >= {"depth", "num_heads", "num_kv_heads", "width"}


def test_all_81_rows_of_the_recomputed_counts():
    rows = paper_tables.table("param_check")
    assert len(rows) == 81
    for row in rows:
        fields = {
            "model.depth": int(row["layers"]),
            "model.num_heads": int(row["heads"]),
            "model.num_kv_heads": int(row["kv_heads"]),
            "model.width": int(row["dim"]),
            "model.ffn_kind": row["ffn"].lower(),
            "model.share_embedding": row["embeddings"] == "tied",
            "model.vocab_size": _vocabulary(row["model"]),
        }
        if row["table"] == "follow-up":
            fields["model.ffn_width"] = int(row["ffn_hidden"])
        model = from_config_dict(base.update(base.get_config(), fields)).model
        counts = accounting.parameters(model)
        assert (counts.total, counts.as_printed) == (
            int(row["params_exact"]),
            int(row["params_without_norms"]),
        )
        assert model.ffn_width == int(row["ffn_hidden"])
        assert model.head_dim == int(row["head_dim"])
        if row["table"] == "follow-up":
            assert paper_tables.agrees(row["printed_M"].removesuffix(".0"), counts.total), row
        elif row["table"] == "T1":  # printed without decimals
            assert paper_tables.agrees(row["printed_M"].removesuffix(".0"), counts.as_printed), row
        elif Decimal(row["printed_M"]) > 1000:  # 1.01B, 1.51B
            assert paper_tables.agrees(f"{Decimal(row['printed_M']) / 1000}B", counts.as_printed), row
        else:
            assert paper_tables.agrees(row["printed_M"], counts.as_printed), row


def _vocabulary(model):
    if "Pro" in model:
        return 202_048
    return 49_152 if "SmolLM" in model else 128_256 if "R1" in model else 32_000


def test_the_list_prints_both_counts_and_the_paper_s():
    lines = table(points_of("configs/roadmap.py:paper_125m", {}, None, ["+ SwiGLU"])).splitlines()
    assert lines[0].split()[3:8] == ["parameters", "no", "gains", "paper", "non-emb."]
    assert all(number in lines[1].split() for number in ("134,105,856", "134,086,656", "134.1", "84,953,856"))
    assert "paper" not in table(points_of("configs/roadmap.py:tiny", {}, None, ()))


@pytest.mark.parametrize(
    ("printed", "count", "agree"),
    [
        ("134.1", 134_086_656, True),
        ("134.1", 134_251_000, False),
        ("949M", 949_616_640, True),  # cut off
        ("362M", 361_758_720, True),  # rounded
        ("1.01B", 1_005_322_240, True),
        ("1.0B", 1_005_322_240, True),
        ("1.1B", 1_005_322_240, False),
    ],
)
def test_agrees_to_every_digit_shown(printed, count, agree):
    assert paper_tables.agrees(printed, count) is agree


@pytest.mark.parametrize("study", ROWS)
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_twins_have_the_paper_s_rows_in_its_order(study, preset):
    points = points_of(f"configs/{study}.py:{preset}", {}, None, (), ("completep",))
    if study in ("depth_vs_width", "layer_sharing", "repeats"):  # whose counts fit untied embeddings only
        assert not any(point.config.model.share_embedding for point in points)
    twins = [point.config.model for point in points if not point.facts["plan"]["control"]]  # ours, not its
    if study == "depth_vs_width":  # fewer rows, over as wide a range of depth
        depths = [model.depth for model in twins]
        assert depths == sorted(depths)
        assert depths[-1] / depths[0] >= 8
        return
    rows = [
        model
        for paper_preset in ROWS[study]
        if "350m" not in paper_preset
        for model, _ in with_csv_rows(study, paper_preset)
    ]
    for twin, row in zip(twins, rows, strict=True):
        assert (twin.sharing, twin.num_repeats, twin.ffn_kind) == (row.sharing, row.num_repeats, row.ffn_kind)
        assert twin.num_heads // twin.num_kv_heads == row.num_heads // row.num_kv_heads
        if study != "layer_sharing" and study != "repeats":
            assert twin.share_embedding == row.share_embedding
    if study == "followups":
        return  # rows of two vocabularies

    # Sizes fall and rise as in the paper, within 6 % of all parameters.
    def relative(models):
        return [
            accounting.parameters(model).as_printed / accounting.parameters(models[0]).as_printed
            for model in models
        ]

    if study != "mobilellm":
        assert relative(twins) == pytest.approx(relative(rows), abs=0.06)


def test_all_studies_are_in_the_collection():
    assert set(ROWS) == {
        spec.removeprefix("configs/").partition(".")[0] for spec in all_studies.studies("tiny")
    }
    for preset in all_studies.PRESETS:
        assert len(points_of(f"configs/paper.py:{preset}", {}, None, ())) > 20


def test_published_accuracies_are_found_by_shape():
    models = [model for model, _ in with_csv_rows("mobilellm", "paper")]
    found = [paper_tables.published(model) for model in models]
    names = [row["model"] for row in paper_tables.table("table09_model_zoo")]
    assert [row and row[0] for row in found] == names
    assert found[0] is not None
    assert (found[0][1]["ARC-e"], found[0][1]["BoolQ"], found[0][1]["Avg"]) == ("43.9", "60.2", "46.3")
    assert (found[0][1]["RACE_high"], found[0][1]["TQA_F1_1shot"]) == ("28.9", "13.9")
    assert found[1] is not None
    assert (found[1][1]["RACE_high"], found[1][1].get("TQA_F1_5shot")) == ("29.6", None)  # it was not found
    assert paper_tables.published(dataclasses.replace(models[0], num_kv_heads=9)) is None
    reverse = dataclasses.replace(models[1], sharing="reverse")  # as large as what was published, but another
    assert paper_tables.published(reverse) is None
