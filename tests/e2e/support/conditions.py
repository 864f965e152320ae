"""Conditions that tests state and wait for."""

import time

TIMEOUT = 60  # seconds; only a hang takes this long


def expect(found, expected, what):
    """Fails with a message that names `what`, unless both values are equal."""
    assert found == expected, f"{what}: expected {expected!r}, found {found!r}"


def until(what, happens, timeout=TIMEOUT, interval=0.05):
    """Calls `happens` at each interval until it returns something true, and returns that.

    Tests wait with this instead of sleeping for a fixed time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if result := happens():
            return result
        time.sleep(interval)
    raise AssertionError(f"timed out after {timeout} s waiting for {what}")
