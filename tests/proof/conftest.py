"""The Trainer collects garbage for every run: of what the libraries made at their import there is none."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imported_stays():
    gc.freeze()
