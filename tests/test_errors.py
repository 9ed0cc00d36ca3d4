"""`require`: a missing package is named with its extra, and OpenVINO's does not report its use."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hfshrink.errors import MissingDependencyError, require

IMPORT = """
import pathlib, socket, sys, threading
def connect(*_):
    raise SystemExit("the network was asked for")
socket.socket.connect = socket.getaddrinfo = connect
from hfshrink.errors import require
require("openvino", extra="openvino").convert_model
assert not list(pathlib.Path.home().iterdir()), "something was written at home"
assert threading.active_count() == 1
"""


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(MissingDependencyError, match=r"'nowhere'.*pip install 'hfshrink\[all\]'"):
        require("nowhere.inner", extra="all")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_reports_nothing(tmp_path):
    """Imported plainly, it writes an id into the user's home and sends its version."""
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_report_that_runs_already_sends_nothing_more(monkeypatch):
    sender = SimpleNamespace(TelemetrySender=type("TelemetrySender", (), {"send": lambda *_: 1 / 0}))
    monkeypatch.setitem(sys.modules, "openvino_telemetry", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "openvino_telemetry.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "openvino_telemetry.utils.sender", sender)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace())
    require("openvino", extra="openvino")
    assert sender.TelemetrySender().send("message") is None
