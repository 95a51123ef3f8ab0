"""Fixtures that tests of several rooms ask for by name."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """One thread for torch: small networks are quickest so, and the numbers do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
