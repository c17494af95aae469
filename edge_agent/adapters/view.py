"""What a person sees of exports, replies and merges."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_agent.adapters.report import Export, Held, Merge, Replies, Said
from edge_agent.console import format_accuracy, format_text, printable
from edge_agent.errors import human_bytes

BASES = {"stored": "its weights as they are stored", "nf4": "its weights as NF4 rounds them, with which the adapter was trained"}


def export_table(report: Export, out: Path) -> Table:
    """Return what was written, and of what."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("written", Text(printable(f"{out}: {', '.join(report.files)} ({human_bytes(report.size_bytes)})")))
    grid.add_row("base model", Text(printable(report.model.name)) + (f", {BASES[report.base]}" if report.base else ""))
    if report.difference is not None:
        grid.add_row("logits", f"{report.difference:.1e} from those of base and adapter (relative; rounding to {report.dtype})")
    grid.add_row("took", f"{report.seconds:.1f} s, peak {human_bytes(report.peak_bytes)} of memory")
    return grid


def replies_view(replies: Replies) -> Group:
    """Return the answers of base model and adapter, one below the other."""
    parts = [_panel("base", replies.base)]
    if replies.adapter is not None:
        parts.append(_panel("adapter", replies.adapter))
    return Group(*parts)


def _panel(name: str, said: Said) -> Panel:
    cut = "" if said.ended else ", cut off"
    title = f"{name}  [dim]{said.tokens} tokens in {said.seconds:.1f} s{cut}[/]"
    return Panel(Text(printable(said.text)), title=title, title_align="left", border_style="green" if name == "adapter" else "dim")


def merge_view(report: Merge, out: Path) -> Group:
    """Return how adapters were merged, and what that gave."""
    grid = Table.grid(padding=(0, 2))
    kept = f", density {report.density:g}" if report.density is not None else ""
    grid.add_row(
        "merged", Text(printable(f"{out / 'adapter'}  (sha256 {report.adapter.sha256[:12]}…, {human_bytes(report.adapter.size_bytes)})"))
    )
    grid.add_row("method", f"{report.method}{kept}; rank {report.rank}")
    for part in report.parts:
        known = "" if part.fingerprint_known else "; no report tells which base model it was trained on"
        trained = "" if part.questions is None else f", {part.questions:,} questions"
        grid.add_row(f"{100 * part.weight:.1f} %", Text(printable(f"{part.name}{trained}{known}")))
    if not report.held_out:
        return Group(grid, Text("not measured: give --evaluate FILE with questions that no part was trained on"))
    return Group(grid, _against(report))


def _against(report: Merge) -> Table:
    table = Table(title=f"On the same {report.held_out:,} questions (95 % intervals)", title_justify="left", title_style="bold")
    for name in ("", "measured", "merged adapter against it"):
        table.add_column(name)
    for held in report.against:
        table.add_row(Text(printable(held.name)), _value(held), _paired(held))
    own = format_text(report.text) if report.text else format_accuracy(report.accuracy)
    table.add_row(Text("merged", style="bold"), Text(own, style="bold"), "")
    return table


def _value(held: Held) -> str:
    return format_text(held.text) if held.text else format_accuracy(held.accuracy)


def _paired(held: Held) -> str:
    if pair := held.merged.paired:
        points = f"{100 * pair.difference:+.1f} points [{100 * pair.low:+.1f}, {100 * pair.high:+.1f}]"
        return f"{points}, p = {pair.p_value:.3f}"
    if text := held.merged.text_difference:
        return f"{text.value:+.4f} nats a token [{text.low:+.4f}, {text.high:+.4f}]"
    return held.merged.reason or "-"
