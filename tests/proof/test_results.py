"""Reading a proof that others wrote."""

import pytest

from hfshrink.errors import CheckpointError
from hfshrink.proof.results import Arm, Interval, Proof, Scores

SCORES = Scores(*(Interval(0.5, 0.4, 0.6) for _ in range(4)), "bad", 0.25)
PROOF = Proof(
    *("text-classification", "org/model", "Trainer", 10, 5, None, (0,), 100),
    (Arm("full", None, 10, 3.0, 30, 1.5, None, None, 0.75, 0.25, SCORES),),
    test={"rows": 4},
)


def test_table_shows_each_arm():
    assert "| full | 10   | 3      | 30    | 0.5000 [0.4000, 0.6000] |" in str(PROOF)
    assert "1 seed, 4 test rows" in str(PROOF)
    assert Proof.from_dict(PROOF.to_dict()) == PROOF


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "Expected a proof of format 1, got 2"),
        ({"arms": None}, "incomplete or damaged"),
        ({"arms": [{"data": "full"}]}, "incomplete or damaged"),
        ({"arms": [{**PROOF.to_dict()["arms"][0], "rows": "many"}]}, "incomplete or damaged"),
        ({"test": {}}, "incomplete or damaged"),
        ({"seeds": 3}, "incomplete or damaged"),
    ],
)
def test_damaged_proofs_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        Proof.from_dict({**PROOF.to_dict(), **changes})
    with pytest.raises(CheckpointError, match="got 'list'"):
        Proof.from_dict([])
