"""From scores to masks: exact counts, ties, patterns on the way, and groups that must not be emptied."""

import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria.ranking import hidden_in_pattern, hidden_weights, kept_units


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in (("a", (6, 8)), ("b", (4, 5)))}


def total(masks):
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("scope", ["global", "module"])
def test_what_goes_equals_a_sort(scope):
    given = scores()
    hidden = hidden_weights(given, 0.5, scope=scope)
    for name, values in given.items():
        rivals = torch.cat([v.flatten() for v in given.values()]) if scope == "global" else values.flatten()
        assert torch.equal(hidden[name], values < rivals.sort().values[round(0.5 * len(rivals))])


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("values", [0.0, 1.0, -1.0])
def test_equal_scores_go_in_the_asked_number_the_last_first(scope, values):
    given = {name: torch.full_like(value, values) for name, value in scores().items()}
    hidden = hidden_weights(given, 0.25, scope=scope, signed=True, max_sparsity=0.9)
    assert total(hidden) == round(0.25 * 68)
    for mask in hidden.values():
        flat = mask.flatten().long()
        assert torch.equal(flat, flat.sort().values)


def test_the_coarse_values_of_halves_do_not_make_a_model_less_sparse():
    given = {name: values.bfloat16() for name, values in scores().items()}
    assert [total(hidden_weights(given, share)) for share in (0.25, 0.5, 0.75)] == [17, 34, 51]


def test_no_module_loses_more_than_the_cap():
    given = scores()
    given["b"] = given["b"] - 10  # the lowest of all
    hidden = hidden_weights(given, 0.5, max_sparsity=0.6, signed=True)
    assert int(hidden["b"].sum()) == 12
    assert total(hidden) == 34


def test_the_cap_itself_can_be_asked_for():
    given = {str(size): torch.rand(size) for size in (7, 9, 11, 13)}
    hidden = hidden_weights(given, 0.8, max_sparsity=0.8)
    assert {name: int(mask.sum()) for name, mask in hidden.items()} == {"7": 6, "9": 7, "11": 9, "13": 10}


def test_nothing_goes_at_sparsity_0():
    assert total(hidden_weights(scores(), 0.0)) == 0
    assert total(hidden_in_pattern({"a": scores()["a"]}, (2, 4), 0.0)) == 0


def test_a_module_is_not_emptied():
    with pytest.raises(SettingError, match="leaves a empty: it has 2 weights"):
        hidden_weights({"a": torch.rand(2)}, 0.8, scope="module")


def test_a_pattern_leaves_exactly_n_of_m():
    hidden = hidden_in_pattern({"a": scores()["a"]}, (1, 4))["a"]
    assert ((~hidden).unflatten(1, (-1, 4)).sum(-1) == 1).all()


@pytest.mark.parametrize("share", [0.25, 0.5, 1 - 1e-9])
def test_on_the_way_to_a_pattern_the_cheapest_groups_have_it(share):
    values = scores()["a"]  # 12 groups of 4
    groups = hidden_in_pattern({"a": values}, (2, 4), share)["a"].unflatten(1, (-1, 4))
    costs = values.unflatten(1, (-1, 4)).sort(-1).values[..., :2].sum(-1)
    chosen = groups.any(-1)
    assert int(chosen.sum()) == round(share * 12)
    assert (groups.sum(-1)[chosen] == 2).all()
    assert chosen.all() or costs[chosen].max() <= costs[~chosen].min()


def test_each_group_keeps_a_unit_and_small_groups_do_not_bind_large_ones():
    given = {"small": torch.tensor([1.0, 2.0]), "large": torch.arange(20.0) + 3}
    kept = kept_units(given, 0.9)
    assert kept["small"].tolist() == [False, True]
    assert int(kept["large"].sum()) == 1
    assert total(kept) == 22 - round(0.9 * 22)


def test_what_would_empty_a_group_is_refused():
    with pytest.raises(SettingError, match="leaves a empty: it has 4 units"):
        kept_units({"a": torch.rand(4)}, 0.9, scope="module")
    with pytest.raises(SettingError, match="can't be reached"):
        kept_units({"a": torch.rand(4)}, 0.9)
