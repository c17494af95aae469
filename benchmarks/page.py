"""The page of the benchmarks: its generated parts, and how plots are drawn for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_agent.files import write_file

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"


def result_file(benchmark: str, device: str, shape: str) -> Path:
    """Return where the results of a benchmark of the engine are."""
    return RESULTS / f"{benchmark}-{device}-{shape}.json"


def result_files(benchmark: str) -> list[Path]:
    """Return all results of a benchmark of the engine, whatever the device and the shape."""
    return sorted(RESULTS.glob(f"{benchmark}-*.json"), key=lambda file: file.stem)


def shown(name: str) -> list[str]:
    """Return the lines of a part as they stand on the page."""
    return PAGE.read_text(encoding="utf-8").partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0].strip().split("\n")


def write_parts(parts: Mapping[str, list[str]], page: Path = PAGE) -> None:
    """Put lines between the marks of their names on a page."""
    text = page.read_text(encoding="utf-8")
    for name, lines in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = text.partition(start)
        if not rest:
            raise SystemExit(f"{page} has no place for {name!r}")
        text = head + start + "\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]
    write_file(page, text.encode())


@contextmanager
def drawn(name: str, rows: int, columns: int, **options: Any) -> Iterator[Any]:
    """Yield the panels of a figure, rows x columns, that is then written beside the page as SVG, always to the same bytes."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "edge-agent"
    figure, axes = plt.subplots(rows, columns, squeeze=False, **options)
    yield axes
    figure.tight_layout()
    figure.savefig(PAGE.parent / name, metadata={"Date": None})
    plt.close(figure)
