"""Which layer is matched with which."""

import pytest

from hfshrink.distillation.losses.mapping import find_layer, map_layers
from hfshrink.errors import SettingError


def test_uniform_map_is_tinyberts():
    # TinyBERT4 learns from layers 3, 6, 9, 12 of BERT-base, TinyBERT6 from 2, 4, …, 12 (counted from 1)
    assert map_layers(4, 12) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert list(map_layers(6, 12).values()) == [1, 3, 5, 7, 9, 11]


def test_skip_and_last_maps_are_pkds():
    # PKD6 from BERT-base: skip {2, 4, 6, 8, 10}, last {7, 8, 9, 10, 11} (counted from 1)
    assert map_layers(6, 12, "skip") == {0: 1, 1: 3, 2: 5, 3: 7, 4: 9}
    assert map_layers(6, 12, "last") == {0: 6, 1: 7, 2: 8, 3: 9, 4: 10}


@pytest.mark.parametrize("layers", ["uniform", "skip", "last"])
def test_equal_depths_match_layer_by_layer(layers):
    mapping = map_layers(5, 5, layers)
    assert mapping == {i: i for i in range(len(mapping))}
    assert len(mapping) == (5 if layers == "uniform" else 4)


def test_every_map_rises_and_stays_inside_the_teacher():
    for teacher in range(1, 30):
        for student in range(1, teacher + 1):
            values = list(map_layers(student, teacher).values())
            assert values[-1] == teacher - 1
            assert values == sorted(set(values))
            assert values[0] >= 0
            # never more than half a layer from TinyBERT's line
            assert all(abs(v + 1 - (i + 1) * teacher / student) <= 0.5 for i, v in enumerate(values))


def test_explicit_pairs_may_count_from_the_end():
    assert map_layers(3, 12, {0: 0, -1: -1, 1: 6}) == {0: 0, 2: 11, 1: 6}
    assert find_layer(-12, 12, "teacher") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2), "student has 4 layers, the teacher only 2.*uniform"),
        ((1, 6, "skip"), "student has only one .the teacher 6"),
        ((2, 6, "every"), "layers must be one of uniform, skip, last or a mapping, got 'every'"),
        ((2, 6, {}), "at least one pair.*got {}"),
        ((2, 6, [1, 2]), "or name at least one pair"),
        ((2, 6, {2: 0}), r"student has 2 layers, 0\.\.1 .*got layer 2"),
        ((2, 6, {0: 6}), r"teacher has 6 layers, 0\.\.5 .*got layer 6"),
        ((2, 6, {"0": 1}), "got layer '0'"),
        ((2, 6, {True: 1}), "got layer True"),
        ((2, 6, {1: 1, -1: 2}), "names the student's layer 1 twice"),
    ],
)
def test_maps_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        map_layers(*arguments)
