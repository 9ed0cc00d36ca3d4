"""What `QAT` accepts, and what it says of itself."""

import pytest

from hfshrink.errors import SettingError
from hfshrink.quantization.training.settings import QAT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be a whole number in 2..8, got 1"),
        ({"weight_bits": 16}, "nothing to train"),
        ({"weight_bits": True}, "got True"),
        ({"weight_bits": 4.0}, "got 4.0"),
        ({"activation_bits": 4}, "activation_bits must be 8, or None"),
        ({"activation_bits": 8.0}, "activation_bits must be 8, or None"),
        ({"group_size": 1}, "group_size must be a whole number of at least 2"),
        ({"activation_ranges": "minmax"}, "activation_ranges must be one of ema, lsq"),
        ({"weight_ranges": "ema"}, "weight_ranges must be one of max, lsq"),
        ({"activation_bits": None, "activation_ranges": "lsq"}, "activation_bits=None has none"),
        ({"start": 30}, "For 30 percent give 0.3"),
        ({"start": float("nan")}, "start must be the share of all steps.*got nan"),
        ({"freeze": -0.1}, "freeze must be the share of all steps"),
        ({"start": 0.6, "freeze": 0.4}, "leaves no step in between"),
        ({"decay": 1.0}, "decay must be a number in"),
        ({"scale_learning_rate": -1}, "scale_learning_rate must be a number of at least 0"),
        ({"embeddings": 1}, "embeddings must be True or False"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        QAT(**settings)


def test_the_record_names_the_run_and_what_differs():
    given = QAT(4, start=0.1).given()
    assert given == {"weight_bits": 4, "activation_bits": 8, "group_size": None, "start": 0.1}
    assert QAT(**given) == QAT(4, start=0.1)


@pytest.mark.parametrize(("bits", "name"), [((8, 8), "qat-w8a8"), ((4, 8), "qat-w4a8"), ((3, None), "qat-w3")])
def test_the_method_says_the_bits(bits, name):
    assert QAT(*bits).method == name


def test_only_lsq_is_learned():
    assert not QAT().is_learned
    assert QAT(weight_ranges="lsq").is_learned
    assert QAT(activation_ranges="lsq").is_learned
