"""What `Pruning` accepts, and what it says of itself."""

import pytest

from hfshrink.errors import SettingError
from hfshrink.pruning.training.settings import Pruning, check_sparsity, read_pattern


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": None}, "sparsity must be the share that goes, a number in .* got None"),
        ({"sparsity": 90}, "For 90 percent give 0.9"),
        ({"sparsity": True}, "got True"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": 0.5, "warmup": 1}, "warmup must be a number in"),
        ({"sparsity": 0.5, "warmup": 0.6, "cooldown": 0.5}, "0.6 \\+ 0.5 is more than 1"),
        ({"sparsity": 0.5, "initial_sparsity": 0.6}, "initial_sparsity 0.6 is above sparsity 0.5"),
        ({"sparsity": 0.99}, "above max_sparsity 0.98"),
        ({"sparsity": 0.5, "structure": "2:4:8"}, "structure must be one of"),
        ({"sparsity": 0.5, "structure": "layers"}, "call prune"),
        ({"structure": "4:2"}, "1 ≤ n < m"),
        ({"structure": "2:4", "sparsity": 0.6}, "2:4 means a sparsity of 0.5"),
        ({"sparsity": 0.5, "method": "wanda"}, "method must be one of"),
        ({"sparsity": 0.5, "schedule": "cosine"}, "schedule must be one of"),
        ({"sparsity": 0.5, "scope": "row"}, "scope must be one of"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds must be a whole number"),
        ({"sparsity": 0.5, "update_steps": 1.5}, "update_steps must be a whole number"),
        ({"sparsity": 0.5, "penalty": -1}, "penalty must be a number of at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Pruning(**settings)


def test_the_record_names_the_run_and_what_differs():
    given = Pruning(0.8, method="movement", warmup=0.2).given()
    named = {"sparsity": 0.8, "structure": "unstructured", "method": "movement", "schedule": "cubic"}
    assert given == {**named, "warmup": 0.2}
    assert Pruning(**given) == Pruning(0.8, method="movement", warmup=0.2)


@pytest.mark.parametrize(("structure", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("1:3", 2 / 3)])
def test_a_pattern_says_its_sparsity(structure, sparsity):
    assert Pruning(structure=structure).final == pytest.approx(sparsity)
    assert check_sparsity(Pruning(structure=structure).sparsity, structure) == pytest.approx(sparsity)


def test_other_structures_have_no_pattern():
    assert read_pattern("unstructured") is None
    assert Pruning(0.5, "heads").is_structured
    assert not Pruning(0.5).is_structured


def test_learned_scores_start_from_magnitudes_at_a_small_rate():
    near, far = Pruning(0.5, method="movement"), Pruning(0.5, method="movement", initial_scores="zero")
    assert (near.ranked, near.scores_rate, far.ranked, far.scores_rate) == ("global", 1e-3, "module", 1e-2)
    assert Pruning(0.5, method="movement", scores_learning_rate=0.1).scores_rate == 0.1
    with pytest.raises(SettingError, match="initial_scores must be one of magnitude, zero, got 'ones'"):
        Pruning(0.5, initial_scores="ones")
