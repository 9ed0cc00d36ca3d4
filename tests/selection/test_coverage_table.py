"""Records of a coverage: read back, refused where they are none, printed."""

import pytest

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.selection.coverage_table import Coverage, GroupShare, PartitionCoverage, Radius, Thresholds


def made():
    groups = tuple(GroupShare(f"g{number:02}", 10, number % 3, number % 3 / 2) for number in range(30))
    part = PartitionCoverage("source", 1, groups, 30, 10, 100, 9.5, 0.25, 0.2, 40.0, 0.03)
    return Coverage(300, 60, (part,), Radius(2.5, 0.5, 2.0, 0.4, 100), ("by source: …",), ("labels: none.",))


def test_records_are_read_back():
    assert Coverage.from_dict(made().to_dict()) == made()
    assert Coverage.from_dict(Coverage(10, 5).to_dict()) == Coverage(10, 5)


@pytest.mark.parametrize("data", [{}, {"rows": 1, "size": 1, "other": 2}, {"rows": 3, "size": 1, "partitions": 7}, []])
def test_other_data_are_no_record(data):
    with pytest.raises(CheckpointError, match="Expected a record of a subset's coverage"):
        Coverage.from_dict(data)


def test_the_print_shows_the_least_kept_of_many_groups_and_what_is_unknown():
    text = str(made())
    assert "60 of 300 rows kept (20 %)" in text
    assert "| source     | 30     | 10 (100)    | 9.5            | 0.250 (0.200)            | 40.0 | 0.03 |" in text
    assert "| source (the 20 least kept of 30) | rows | kept | share kept / overall |" in text
    assert "g00" in text
    assert "g29" not in text
    assert "distance to the nearest kept row, 100 rows sampled" in text
    assert text.endswith("warning: by source: …\n\nnot measured: labels: none.")


def test_lost_groups_are_the_largest_first():
    groups = (GroupShare("a", 5, 0, 0.0), GroupShare("b", 9, 0, 0.0), GroupShare("c", 9, 3, 1.0))
    part = PartitionCoverage("x", 1, groups, 3, 2, 14, 0.1, 0.1, 0.1, 1.0)
    crossed = PartitionCoverage("x × y", 2, groups, 3, 2, 14, 0.1, 0.1, 0.1, 1.0)
    assert [group.name for group in Coverage(23, 3, (part, crossed)).lost] == ["b", "a"]


@pytest.mark.parametrize("wrong", [{"least_ratio": -0.1}, {"significance": 2}, {"min_rows": "3"}, {"min_rows": True}])
def test_thresholds_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=f"The threshold {next(iter(wrong))} must be a number from 0 to"):
        Thresholds(**wrong)
