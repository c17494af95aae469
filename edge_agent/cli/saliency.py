"""The command `edge-agent saliency`."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from edge_agent.cli.fleet import CoordinatorConfigOption, UrlOption, client_of
from edge_agent.cli.shared import explained
from edge_agent.config import COORDINATOR_CONFIG
from edge_agent.files import check_writable, write_file
from edge_agent.job_directory import JobDirectory
from edge_agent.messages import is_ulid


def saliency(
    job: Annotated[str, typer.Argument(metavar="JOB|DIR", help="A job of the method nlft: its directory, or its id at the coordinator.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write the page to this file, which needs nothing else, and end.")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser of this machine.")] = True,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
) -> None:
    """Show the Saliency Map of a job: every token with its weight, why it has it, and what other options would make of it.

    Of a job that still trains it is the map as it stands, and another one each time the page is loaded again.
    Serves the page to this machine only, at an address that nobody can guess, until Ctrl-C.
    """
    with explained(as_json=False):
        from edge_agent.web.loopback import Loopback

        render = _renderer(job, config, url)
        page = render()
        if html is not None:
            check_writable(html)
            write_file(html, page[0], private=True)
            typer.echo(str(html))
            return
        with Loopback(render) as server:
            typer.echo(server.url)
            if browser:
                webbrowser.open(server.url)
            with suppress(KeyboardInterrupt):
                server.serve_forever()


def _renderer(job: str, config: Path, url: str | None) -> Callable[[], tuple[bytes, str]]:
    """Return what makes the page anew."""
    from edge_agent.saliency_page import WAIT_S, page_of, saliency_page

    if Path(job).exists() or not is_ulid(job):
        return lambda: saliency_page(JobDirectory(Path(job)), WAIT_S)

    def render() -> tuple[bytes, str]:
        with client_of(config, url) as client:
            data, document = client.saliency(job)
        return page_of(data, document, f"the Saliency Map of job {job}")

    return render
