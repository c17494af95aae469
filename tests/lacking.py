"""What a machine lacks: most runs leave out what needs it, and say so; `make test-all` fails, so that nothing of it is green untried."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

ALL = "EDGE_AGENT_TEST_ALL"
"""Set by `make test-all`: whatever can be had by installing packages, or as root, has to be there."""


def lack(why: str, *, whole_file: bool = False) -> NoReturn:
    """Skip the test, in words; where `EDGE_AGENT_TEST_ALL` is set it fails with them."""
    __tracebackhide__ = True
    if os.environ.get(ALL):
        pytest.fail(f"{why} ({ALL} is set: nothing may be left out)", pytrace=False)
    pytest.skip(why, allow_module_level=whole_file)
