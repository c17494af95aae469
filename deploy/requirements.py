"""Prints what pyproject.toml asks for, one requirement a line: of the project and of the extras that are named, without some packages.

`python3 deploy/requirements.py coordinator s3 --without torch peft`, where pyproject.toml is. So an image installs packages in a layer that
a change of the project's code leaves alone, and a coordinator those that it imports. Needs Python 3.11 and no package, or tomli.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib


def requirements(project: dict[str, Any], extras: list[str]) -> Iterator[str]:
    """Yield the requirements of a `[project]` table, those of extras that an extra names included."""
    yield from project["dependencies"]
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            yield from requirements({**project, "dependencies": []}, own[1].split(",")) if own else [requirement]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--without", nargs="*", default=[], metavar="PACKAGE")
    given = parser.parse_args()
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in requirements(project, given.extras):
        if re.match(r"[\w.-]+", requirement)[0] not in given.without:  # type: ignore[index]  # every requirement begins with a name
            print(requirement)


if __name__ == "__main__":
    main()
