"""The folder of finished runs: held by one process, founded anew after a kill, refused where it is something else."""

import threading

import pytest

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.proof.store import open_store


def opened(folder, **fingerprint):
    return open_store(folder, {"model": "a", **fingerprint}, {"test": 3}, 2)


def test_second_process_waits_until_the_first_is_done(tmp_path):
    done = []

    def second():
        with opened(tmp_path / "runs"):
            done.append(1)

    thread = threading.Thread(target=second)
    with opened(tmp_path / "runs"):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert not done
    thread.join(10)
    assert done


def test_what_a_killed_founder_left_is_no_obstacle(tmp_path):
    (tmp_path / ".proof.json.x1").write_text("{")
    with opened(tmp_path) as store:
        assert store.folder == tmp_path
    with pytest.raises(SettingError, match=r"model \(was a, is b\)"), opened(tmp_path, model="b"):
        pass


def test_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds files and no proof.json"), opened(tmp_path):
        pass
    with pytest.raises(CheckpointError, match="is a file"), opened(tmp_path / "notes.txt"):
        pass
