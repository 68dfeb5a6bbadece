import time

import pytest

from dmd_jax.runtime import distributed, watchdog


@pytest.fixture
def left(monkeypatch):
    left = []
    monkeypatch.setattr(distributed, "leave", lambda *arguments: left.append(arguments))
    return left


def test_a_run_in_which_nothing_happens_ends(left):
    with watchdog.watching(0.2, "dmd"):
        time.sleep(0.6)
    code, line = left[0]
    assert code == distributed.LOST and line.startswith("dmd: nothing has happened for 0 s")


@pytest.mark.parametrize("seconds", [0, 0.4])
def test_a_run_that_goes_on_does_not(left, seconds):
    with watchdog.watching(seconds, "dmd") as alive:
        for _ in range(8):
            alive()
            time.sleep(0.1)
    time.sleep(0.6)
    assert not left
