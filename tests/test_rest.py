"""A node rests in its quiet hours and while its device is hot; a trainer that runs then stops, and its job goes on afterwards."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import DAYS, AgentConfig, RestLimits, read_config
from edge_agent.errors import ConfigInvalid
from edge_agent.rest import LOOK_S, Rest, is_within

MONDAY = datetime(2026, 3, 2)
MINUTES_OF_WEEK = 7 * 24 * 60


def _at(day: str, clock: str) -> datetime:
    hour, minute = map(int, clock.split(":"))
    return MONDAY + timedelta(days=DAYS.index(day), hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("hours", "day", "clock", "within"),
    [
        ("08:00-18:00", "sun", "08:00", True),
        ("08:00-18:00", "sun", "17:59", True),
        ("08:00-18:00", "sun", "18:00", False),
        ("22:00-06:00", "wed", "23:00", True),
        ("22:00-06:00", "wed", "05:59", True),
        ("22:00-06:00", "wed", "06:00", False),
        ("mon-fri 08:00-18:00", "fri", "12:00", True),
        ("mon-fri 08:00-18:00", "sat", "12:00", False),
        ("fri 22:00-06:00", "sat", "03:00", True),
        ("fri 22:00-06:00", "fri", "03:00", False),
        ("sat-mon 08:00-18:00", "sun", "12:00", True),
        ("sat-mon 08:00-18:00", "tue", "12:00", False),
        ("sun 22:00-06:00", "mon", "05:00", True),
        ("00:00-00:00", "mon", "13:00", True),
    ],
)
def test_time_within_hours(hours: str, day: str, clock: str, within: bool) -> None:
    """Ends are excluded; hours that pass midnight belong to the day on which they begin; days go around the week."""
    assert is_within(hours, _at(day, clock)) == within


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, MINUTES_OF_WEEK - 1))
def test_hours_and_their_rest_are_the_day(begin: int, end: int, minute: int) -> None:
    """What is within hours is not within those from their end to their beginning, and the other way round."""
    now = MONDAY + timedelta(minutes=minute)
    texts = [f"{b // 60:02d}:{b % 60:02d}-{e // 60:02d}:{e % 60:02d}" for b, e in ((begin, end), (end, begin))]
    assert sum(is_within(text, now) for text in texts) == (2 if begin == end else 1)


@pytest.mark.parametrize(
    "hours", ["8:00-18:00", "24:00-06:00", "08:00", "mon 8-18", "mo 08:00-18:00", "mon-fri  08:00-18:00", "08:00-18:00\n"]
)
def test_hours_that_make_no_sense_are_refused(hours: str, tmp_path: Path) -> None:
    """By the file that holds them."""
    file = tmp_path / "agent.toml"
    escaped = hours.replace("\n", "\\n")
    file.write_text(f'node = "n"\nstate_directory = "s"\nbudget = "1GiB"\nmodels = {{}}\n[rest]\nquiet_hours = ["{escaped}"]\n')
    with pytest.raises(ConfigInvalid, match="quiet_hours"):
        read_config(file, AgentConfig)


def test_hot_device_works_again_when_it_has_cooled() -> None:
    """Not at the limit already, or it would start and stop all the time; a device without a thermometer never rests."""
    temperatures = [None, 79.0, 80.0, 81.0, 75.0, 71.0, 70.0, 75.0, 81.0, None]
    coming, clock = iter(temperatures), count(step=LOOK_S)
    rest = Rest(RestLimits(max_temperature_c=80, cool_by_c=10), lambda: next(coming), lambda: MONDAY, lambda: next(clock))
    found = [rest.due() for _ in temperatures]
    assert [due is not None for due in found] == [False, False, False, True, True, True, False, False, True, False]
    for due in filter(None, found):
        assert (due.reason, "80" in due.text, "70" in due.text) == ("thermal", True, True)


def test_thermometer_is_not_read_all_the_time() -> None:
    """Between two looks what was seen holds."""
    now = [100.0]
    coming = iter([90.0, 20.0])
    rest = Rest(RestLimits(max_temperature_c=80), lambda: next(coming), lambda: MONDAY, lambda: now[0])
    for looked_at, rests in ((100.0, True), (101.0, True), (100.0 + LOOK_S - 0.1, True), (100.0 + LOOK_S, False), (101.0 + LOOK_S, False)):
        now[0] = looked_at
        assert (rest.due() is not None) == rests


def test_nothing_is_read_without_limits() -> None:
    """A node without the table rests never."""
    assert Rest(RestLimits(), lambda: pytest.fail("read"), lambda: MONDAY).due() is None
