"""The documentation as a site: it is built without a warning, no link of it is broken, and it loads nothing of others."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT
from site_building import build

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "audio": "src", "object": "data"}


class Links(HTMLParser):
    """What a page has: names of places in it, what it loads, and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: set[str] = set()
        self.leads: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value}
        if "id" in given:
            self.ids.add(given["id"])
        if LOADED.get(tag) in given:
            self.loaded.add(given[LOADED[tag]])
        if tag == "a" and "href" in given:
            self.leads.add(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Links]:
    """The pages of the site, built as `make docs` builds it, but elsewhere."""
    built = build(tmp_path_factory.mktemp("site").resolve())
    # What a web server shows for a page that is not there has addresses from the server's root.
    return {page: Links(page) for page in built.rglob("*.html") if page.name != "404.html"}


def test_site_has_every_document_and_every_page_that_is_made_of_the_code(site: dict[Path, Links]) -> None:
    names = {page.stem for page in site}
    assert {document.stem for document in (ROOT / "docs").glob("*.md")} <= names
    assert {"commands", "configuration", "messages", "http", "metrics", "codes"} <= names


def test_no_link_of_the_site_is_broken(site: dict[Path, Links]) -> None:
    """Every address within the site is that of a file, and the place in it that is named exists."""
    broken = []
    for page, links in site.items():
        for link in links.loaded | links.leads:
            parts = urlsplit(link)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if parts.scheme or (
                target.is_file() and (not parts.fragment or target not in site or unquote(parts.fragment) in site[target].ids)
            ):
                continue
            broken.append(f"{page.name}: {link}")
    assert broken == []


def test_site_loads_nothing_of_others(site: dict[Path, Links]) -> None:
    """No page has a script, style, font or picture from elsewhere, so the site can be read without a network."""
    assert {link for links in site.values() for link in links.loaded if urlsplit(link).scheme or link.startswith("//")} == set()
    styles = [style.read_text(encoding="utf-8") for style in next(iter(site)).parents[0].rglob("*.css")]
    assert styles
    assert not any("url(http" in style or "url(//" in style or "@import" in style for style in styles)
