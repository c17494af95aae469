"""The commands of the documents are run as they are written, or the document says why they are not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Cli
from shell_blocks import DOCUMENTS, Block, Shell, blocks_of, matches, transcript, warm_programs

BLOCKS = {document: [b for b in blocks_of(document)[0] if b.when == "now"] for document in DOCUMENTS}


@pytest.fixture(scope="module")
def programs(cli: Cli) -> Iterator[Path]:
    with warm_programs(cli) as place:
        yield place


@pytest.fixture(scope="module")
def demo(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "demo"
    assert cli("demo", "--data-only", "--out", out).code == 0
    return out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_shell_block_says_how_it_is_tried(document: Path) -> None:
    """Each is run by a test or has the reason why not, and no command stands outside of such a block."""
    assert blocks_of(document)[1] == []


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if BLOCKS[d]], ids=lambda path: path.name)
def test_commands_of_a_document_do_what_it_says(document: Path, programs: Path, demo: Path, tmp_path: Path) -> None:
    """The blocks of a document that are quick run in their order, in a directory of their own."""
    shutil.copytree(demo, tmp_path / "demo")
    shell = Shell(tmp_path, programs)
    for block in BLOCKS[document]:
        shell.run(block)


def test_what_blocks_do_is_held_against_what_stands_there(tmp_path: Path) -> None:
    """A command that fails, succeeds where it should not, or says something else fails the test; exported names are kept."""
    shell = Shell(tmp_path, tmp_path)

    def run(text: str, console: bool) -> None:
        shell.run(Block(tmp_path / "page.md", 7, text, console, "now"))

    run("export COLOUR=red\ncd ..\n", console=False)
    run("$ echo $COLOUR \\\n    wine\nred wine\n$ echo 'error cold: 3 degrees' && exit 4\nerror cold: …\n", console=True)
    with pytest.raises(AssertionError, match=r"page\.md:7: exit status 3"):
        run("(exit 3)\ntrue\n", console=False)
    with pytest.raises(AssertionError, match="exit status 5"):
        run("$ exit 5\n", console=True)
    with pytest.raises(AssertionError, match="exit status 0"):
        run("$ echo error cold: 3\nerror cold: …\n", console=True)
    with pytest.raises(AssertionError, match="and not\nblue"):
        run("$ echo $COLOUR\nblue\n", console=True)


def test_documents_are_read_as_they_are_shown(tmp_path: Path) -> None:
    """What is a block, what it says above it, and commands where none should be."""
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run -->\n```sh\nls\n```\n\n<!-- not run: it is long -->\n```console\n$ ls\n```\n\n"
        "```sh\nls\n```\n\n```\nmake it\n```\n\n    make it\n    of wood\n\n"
        "<!-- run: service -->\n```sh\nls\n```\n<!-- not run: -->\n```sh\nls\n```\n",
        encoding="utf-8",
    )
    blocks, wrong = blocks_of(page)
    assert [(b.line, b.when, b.console) for b in blocks] == [(2, "now", False), (7, None, True), (23, "service", False)]
    assert [place.split(":")[1] for place in wrong] == ["11", "15", "27", "19"]
    page.write_text("<!-- all run by: tests/test_shell_blocks.py -->\n```sh\nls\n```\n", encoding="utf-8")
    assert blocks_of(page) == ([], [])  # this test names page.md
    page.write_text("<!-- all run by: tests/test_nothing.py -->\n```sh\nls\n```\n", encoding="utf-8")
    assert blocks_of(page) == ([], ["page.md: tests/test_nothing.py does not run it"])
    assert transcript("$ a \\\n  b\nc\n$ d\n") == [("a \\\n  b", "c\n"), ("d", "")]
    assert matches("a … c\n", "a b\nb c  \n")
    assert not matches("a … c", "a b")
