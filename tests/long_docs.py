"""All commands of the documents that have any which take minutes, a broker or a coordinator, as they are written, in their order.

Run by name: `pytest tests/long_docs.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fleet import MOSQUITTO, wait_for
from shell_blocks import DOCUMENTS, Block, Shell, blocks_of
from site_building import build

LONG = {document: [b for b in blocks_of(document)[0] if b.when] for document in DOCUMENTS}
LONG = {document: blocks for document, blocks in LONG.items() if any(b.when != "now" for b in blocks)}


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A place with the demo's files, this repository's `deploy`, and `edge-agent` as it is installed."""
    place = tmp_path_factory.mktemp("d")
    programs = place / "programs"
    programs.mkdir()
    (programs / "edge-agent").write_text(f'#!/bin/sh\nexec {sys.executable} -m edge_agent "$@"\n')
    (programs / "edge-agent").chmod(0o755)
    assert MOSQUITTO, "mosquitto is not installed; .ci/run installs it"
    (programs / "mosquitto").symlink_to(MOSQUITTO)
    directory = place / "p"
    directory.mkdir()
    (directory / "deploy").symlink_to(ROOT / "deploy")
    shell = Shell(directory, programs, {"PYTHONPATH": str(ROOT)})
    shell.run(Block(Path("setup"), 1, "edge-agent demo --data-only --out demo\n", False, "now"))
    yield shell
    shell.close()


@pytest.mark.parametrize("document", LONG, ids=lambda path: path.name)
def test_commands_of_a_document_do_what_it_says(document: Path, shell: Shell) -> None:
    """Every block that is run, in its order; what stays runs in the background, and the next begins when the node is there."""
    waited = True
    for block in LONG[document]:
        if block.when == "service":
            shell.serve(block)
            waited = False
            continue
        if not waited:
            wait_for("the node at the coordinator", lambda: _ready(shell))
            waited = True
        shell.run(block)


def _ready(shell: Shell) -> bool:
    """Whether a coordinator in the shell's directory knows a node that is ready."""
    command = [str(shell.programs / "edge-agent"), "nodes", "--json", "--config", "coordinator.toml"]
    done = subprocess.run(command, cwd=shell.directory, env=shell.environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 0 and '"ready"' in done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it, but elsewhere."""
    return build(tmp_path_factory.mktemp("site").resolve())


@pytest.mark.parametrize("width", [1440, 390])
def test_site_is_read_from_a_disk_without_a_network(browser: Any, site: Path, width: int) -> None:
    """Pages open as files without an error, ask for nothing elsewhere and are no wider than the screen; the search finds words in them."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(f"error: {error}"))
    for name in ("index", "fleet", "config", "report", "benchmarks", "reference/commands", "reference/http"):
        page.goto(f"{site.as_uri()}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    page.goto(f"{site.as_uri()}/index.html")
    page.locator("label[for=__search]:visible, .md-search__input:visible").first.click()
    page.keyboard.type("draining")
    page.locator(".md-search-result__item", has_text="drain").first.wait_for(state="attached")
    assert [url for url in asked if not url.startswith(site.as_uri())] == []
    page.close()
