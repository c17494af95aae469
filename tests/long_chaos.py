"""The longer trials of delivery, for `make test-all`: `pytest tests/long_chaos.py`. The short one is in test_chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_chaos import chaos

SABOTAGED = Path(__file__).parent / "sabotaged.py"
PLUGS = {"agent": ("broker", "coordinator"), "coordinator": ("coordinator",)}
"""What is pulled to find out who is sabotaged."""
TIMES = ("--kills", 24, "--jobs", 6, "--seed", 3, "--settle-s", 180)


def test_hundred_strikes_lose_nothing(tmp_path: Path) -> None:
    """Whatever is killed or cut, every job ends once."""
    found = chaos(tmp_path / "chaos.json", "--kills", 100, "--jobs", 20, "--seed", 7)
    assert found["wrong"] == []
    assert sum(found["strikes"].values()) == 100


@pytest.mark.parametrize("who", PLUGS)
def test_honest_fleet_stands_what_the_sabotaged_do_not(who: str, tmp_path: Path) -> None:
    """The same plugs, pulled from a fleet that delivers as it should."""
    assert chaos(tmp_path / "chaos.json", *TIMES, "--strike", *PLUGS[who])["wrong"] == []


@pytest.mark.parametrize("who", PLUGS)
def test_sabotage_is_found(who: str, tmp_path: Path) -> None:
    """A node that deletes what it has sent, and a coordinator that acknowledges what it has not stored, lose messages for good."""
    wrong = chaos(tmp_path / "chaos.json", *TIMES, "--strike", *PLUGS[who], f"--{who}", SABOTAGED, who)["wrong"]
    assert any(text.endswith(" never came") for text in wrong), wrong
