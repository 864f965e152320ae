"""Conditions that tests state and wait for."""

import time

TIMEOUT = 60  # seconds; only a hang meets it


def expect(found, expected, what):
    """Fails with a sentence that names `what` unless both are equal."""
    assert found == expected, f"{what}: expected {expected!r}, found {found!r}"


def until(what, happens, timeout=TIMEOUT, interval=0.05):
    """What `happens` returns once it is true. It is asked again after each interval; nothing waits by the clock for something to start."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if result := happens():
            return result
        time.sleep(interval)
    raise AssertionError(f"waited {timeout} s in vain for {what}")
