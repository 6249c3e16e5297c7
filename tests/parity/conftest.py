"""PyTorch works in one thread: more of them wait for each other while XLA's have work to do."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    pytest.importorskip("torch").set_num_threads(1)
