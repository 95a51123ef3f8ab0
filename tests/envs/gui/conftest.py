"""Tests of browsers count processes of the whole machine: one at a time, also where pytest has several workers."""

import fcntl
import tempfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def one_at_a_time():
    """No other test of this folder runs meanwhile."""
    with Path(tempfile.gettempdir(), "embodied-rft-tests-of-browsers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
