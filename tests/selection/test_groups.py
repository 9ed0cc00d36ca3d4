"""Coverage: shares by hand, laws, and a planted rare group that one subset loses and another keeps."""

import json

import numpy as np
import pytest
from datasets import Dataset

from hfshrink.errors import SettingError
from hfshrink.selection.budgets import random_subset
from hfshrink.selection.coverage_table import Coverage, Thresholds
from hfshrink.selection.groups import coverage


def reviews(n=400):
    """Rows of two classes and two sources with texts of 1 to 20 letters, and embeddings that tell the classes."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, n)
    data = Dataset.from_dict(
        {
            "text": ["x" * length for length in generator.integers(1, 21, n)],
            "label": labels,
            "source": generator.choice(["web", "book"], n),
        }
    )
    points = generator.normal(size=(n, 4)).astype(np.float32)
    points[:, 0] += 6 * labels
    return data, points


def test_shares_by_hand():
    data = Dataset.from_dict({"text": ["a", "a", "a", "long", "long", "long"], "label": [*"xxxyyz"]})
    found = coverage(data, [4, 0, 1], length_buckets=2, thresholds=Thresholds(min_rows=1))
    assert (found.rows, found.size) == (6, 3)
    assert [part.by for part in found.partitions] == [
        "label",
        "length (characters)",
        "label × length (characters)",
    ]
    label, length, both = found.partitions
    assert [(g.name, g.rows, g.kept, round(g.ratio, 3)) for g in label.groups] == [
        ("x", 3, 2, 1.333),
        ("y", 2, 1, 1.0),
        ("z", 1, 0, 0.0),
    ]
    assert label.groups[2].chance == pytest.approx(0.5)  # half of the rows are kept
    assert (label.lost_count, label.lost_rows) == (1, 1)
    assert label.expected_lost == pytest.approx(1 / 20 + 4 / 20 + 10 / 20)  # of the 20 subsets of three rows
    assert label.total_variation == pytest.approx((1 / 6 + 0 + 1 / 6) / 2)
    assert [(g.name, g.kept) for g in length.groups] == [("1", 2), ("4", 1)]
    assert [(g.name, g.kept) for g in both.groups] == [("x × 1", 2), ("y × 4", 1), ("z × 4", 0)]
    assert found.lost == (label.groups[2],)
    assert found.radius is None
    assert found.notes == ("clusters and distances: no embeddings were given.",)


def test_every_factor_is_measured_then_the_label_with_each_and_all_together():
    pytest.importorskip("sklearn")
    data, points = reviews()
    found = coverage(data, random_subset(400, 80), embeddings=points, columns=["source"], clusters=3)
    assert [(part.by, part.factors, part.group_count) for part in found.partitions] == [
        ("label", 1, 2),
        ("length (characters)", 1, 4),
        ("source", 1, 2),
        ("cluster", 1, 3),
        ("label × length (characters)", 2, 8),
        ("label × source", 2, 4),
        ("label × cluster", 2, found.partitions[6].group_count),
        ("label × length (characters) × source × cluster", 4, found.partitions[7].group_count),
    ]
    for part in found.partitions:
        assert sum(group.rows for group in part.groups) == 400
        assert sum(group.kept for group in part.groups) == 80
    assert not found.warnings
    assert not found.notes


def test_keeping_everything_changes_nothing():
    data, points = reviews(60)
    found = coverage(data, np.arange(60), embeddings=points, clusters=1, columns="source")
    for part in found.partitions:
        assert (part.total_variation, part.expected_variation, part.chi_squared, part.p_value) == (0, 0, 0, 1)
        assert (part.lost_count, part.expected_lost) == (0, 0)
        assert all(group.ratio == 1 for group in part.groups)
    assert (found.radius.largest, found.radius.mean, found.radius.random_largest) == (0, 0, 0)
    assert found.warnings == ()


def planted(n=1000):
    """1 % of the rows come from a source of their own, far away from all others."""
    data, points = reviews(n)
    rare = np.arange(0, n, 100)
    sources = np.array(data["source"], dtype=object)
    sources[rare] = "letters"
    points[rare] += 100
    data = data.remove_columns("source").add_column("source", sources.tolist())
    return data, points, rare


def test_a_planted_rare_group_that_is_lost_warns_and_stratification_keeps_it():
    pytest.importorskip("sklearn")
    data, points, rare = planted()
    losing = np.setdiff1d(random_subset(1000, 100), rare)
    found = coverage(data, losing, embeddings=points, columns=["source"], clusters=5, seed=2)
    assert {group.name.partition(" ")[0] for group in found.lost} >= {"letters"}
    assert [group.rows for group in found.lost] == [10, 10]  # as a source and as a cluster
    text = "\n".join(found.warnings)
    assert "by source: 1 of 3 groups are lost: letters (10 rows). A random subset loses 0.4 of such groups" in text
    assert "by cluster: 1 of 5 groups are lost" in text
    assert "the largest distance from a row to its nearest kept row is" in text
    assert "label × source" not in text  # it says nothing new
    strata = np.array(data["source"])
    keeping = random_subset(1000, 100, labels=strata)
    kept = coverage(data, keeping, embeddings=points, columns=["source"], clusters=5)
    assert kept.lost == ()
    assert not any("by source" in text or "by cluster" in text for text in kept.warnings)


def test_thin_groups_warn_where_chance_does_not_explain_them():
    data = Dataset.from_dict({"label": ["a"] * 500 + ["b"] * 500})
    rows = np.r_[0:95, 500:505]
    found = coverage(data, rows)
    assert found.warnings == (
        "by label: 1 of 2 groups are kept far below their share, and not by chance: b (0.10 of its share).",
        "by label: 45.0 % of the subset would have to change groups to be distributed as the full data "
        "(a random subset: 3.8 %).",
    )
    few = coverage(data, [0, 1, 2, 500])  # one of four rows: chance does that
    assert few.partitions[0].groups[1].ratio == 0.5
    assert few.warnings == ()


def test_the_caller_sets_the_thresholds():
    data = Dataset.from_dict({"label": ["a"] * 500 + ["b"] * 500})
    rows = np.r_[0:95, 500:505]
    lax = Thresholds(least_ratio=0.05, largest_distance=0.9)
    assert coverage(data, rows, thresholds=lax).warnings == ()
    strict = Thresholds(largest_distance=0, largest_radius_ratio=0.5)
    points = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    texts = coverage(data, np.r_[0:60, 500:540], embeddings=points, clusters=0, thresholds=strict).warnings
    assert [text.partition(":")[0] for text in texts] == ["by label", "embeddings", "embeddings"]


def test_crossed_groups_warn_only_where_more_are_lost_than_by_chance():
    data = Dataset.from_dict({"label": [0, 1] * 300, "source": [f"s{row // 2 % 20:02}" for row in range(600)]})
    drawn = coverage(data, random_subset(600, 60), columns=["source"])
    both = drawn.partitions[2]
    assert 4 < both.lost_count < 16  # 40 groups of 15 rows, each lost with a chance of 0.2
    assert not any("×" in text for text in drawn.warnings)
    picked = [row for row in range(600) if row // 2 % 20 % 2 == row % 2][:60]  # of each source one class alone
    found = coverage(data, picked, columns=["source"])
    assert [(part.lost_count, part.total_variation) for part in found.partitions[:2]] == [(0, 0), (0, 0)]
    assert found.warnings[0].startswith("by label × source: 20 of 40 groups are lost: 0 × s01 (15 rows)")


def test_groups_below_the_least_number_of_rows_are_counted_without_a_warning():
    data = Dataset.from_dict({"source": ["web"] * 95 + ["book"] * 5, "label": ["a"] * 99 + ["b"]})
    found = coverage(data, np.arange(50), columns=["source"])
    assert {group.name: group.rows for group in found.lost} == {"book": 5, "b": 1}
    assert [text.partition(":")[0] for text in found.warnings] == ["by label"]  # classes are always judged


def test_the_distance_of_many_rows_is_measured_on_a_sample(monkeypatch):
    monkeypatch.setattr("hfshrink.selection.groups.PAIRS", 2000)
    data, points = reviews(400)
    radius = coverage(data, np.arange(0, 400, 4), embeddings=points, clusters=0).radius
    assert radius.measured_rows == 20
    assert 0 < radius.mean <= radius.largest


def test_a_partition_of_many_groups_records_the_least_kept():
    data = Dataset.from_dict({"label": [f"{number % 300:03}" for number in range(600)]})
    part = coverage(data, np.arange(590)).partitions[0]
    assert (part.group_count, len(part.groups)) == (300, 200)
    assert [group.name for group in part.groups if group.ratio < 1] == [f"{number:03}" for number in range(290, 300)]


def test_the_record_is_json_and_prints():
    data, points = reviews(100)
    found = coverage(data, np.arange(20), embeddings=points, clusters=1, columns=["source"])
    again = Coverage.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    text = str(found)
    assert text.startswith("20 of 100 rows kept (20 %)\n\n| divided by ")
    assert "| source | rows | kept | share kept / overall |" in text
    assert "distance to the nearest kept row" in text


def test_images_have_no_length_and_say_so():
    data = Dataset.from_dict({"pixel_values": [[0.0], [1.0], [0.5]], "label": [0, 1, 0]})
    found = coverage(data, [0, 1])
    assert found.notes[0].startswith("lengths: Found 0 columns of text")
    with pytest.raises(SettingError, match="text_columns must be one or two of"):
        coverage(data, [0, 1], text_columns=["review"])


def test_rows_without_labels_are_divided_by_the_rest():
    found = coverage(Dataset.from_dict({"text": ["a", "bb"], "part": ["x", "y"]}), [1], columns=["part"])
    assert [part.by for part in found.partitions] == ["length (characters)", "part", "length (characters) × part"]
    assert found.notes[0] == "labels: none were given, and no column has one label a row."


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "at least one, got float64 of shape"),
        ([True, False, True], "indices must be the numbers of the kept rows"),
        ([0, 3], r"indices must lie in 0..2, the rows of the full data, got 0..3"),
        ([-1, 0], r"got -1..0"),
        ([0, 0, 1], "1 of 3 are repeated"),
        ([[0, 1]], r"got int64 of shape \(1, 2\)"),
    ],
)
def test_row_numbers_that_are_none_are_refused(indices, message):
    with pytest.raises(SettingError, match=message):
        coverage(Dataset.from_dict({"text": ["a", "b", "c"]}), indices)


def test_arrays_that_do_not_match_are_refused():
    data = Dataset.from_dict({"text": ["a", "b", "c"]})
    points = np.ones((3, 2), dtype=np.float32)
    with pytest.raises(SettingError, match=r"labels must be as many as the rows \(3\), got 2"):
        coverage(data, [0], labels=[0, 1])
    with pytest.raises(SettingError, match="one row for each of the 3 rows, got 2"):
        coverage(data, [0], embeddings=points[:2])
    points[1] = np.nan
    with pytest.raises(SettingError, match="embedding of row 1 holds NaN"):
        coverage(data, [0], embeddings=points, clusters=1)
    with pytest.raises(SettingError, match="clusters must be a whole number from 0 on, got 2.5"):
        coverage(data, [0], clusters=2.5)
    with pytest.raises(SettingError, match="The data set is empty"):
        coverage(data.select([]), [0])
    with pytest.raises(SettingError, match="got a streaming one"):
        coverage(data.to_iterable_dataset(), [0])


def test_a_random_subset_of_the_same_seed_is_as_far_away_as_any(monkeypatch):
    monkeypatch.setattr("hfshrink.selection.groups.PAIRS", 400 * 100)  # so that some rows are measured only
    points = np.random.default_rng(1).normal(size=(2000, 8)).astype(np.float32)
    kept = random_subset(2000, 400, 0)
    data = Dataset.from_dict({"label": [0] * 2000})
    radius = coverage(data, kept, embeddings=points, clusters=0, seed=0).radius
    assert radius.measured_rows == 100
    assert 0.9 < radius.mean / radius.random_mean < 1.1
