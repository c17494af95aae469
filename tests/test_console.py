"""What others tell is shown as text: it steers no terminal, is no markup, and breaks no list."""

from __future__ import annotations

import io

import pytest
from orders import NODE
from rich.console import Console, RenderableType

from edge_agent.console import FleetView, nodes_table
from edge_agent.coordinator.views import NodeView
from edge_agent.messages import JobProgress, NodeInfo, NodeLimits, StageDone
from edge_agent.report import Event
from profiles.sensors import Reading, Resources

NONE = Reading(None, "no sensor")
HOSTILE = ["[/boom]", "[red]GPU[/red]", "[link=https://example.org]x[/link]", "\x1b]0;title\x07\x1b[2J", "a\nb\rc", "x" * 100_000]


def _shown(*parts: RenderableType) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for part in parts:
        console.print(part)
    return out.getvalue()


def _harmless(shown: str, text: str) -> bool:
    return not {"\x1b", "\x07", "\r"} & set(shown) and ("[" not in text or "\x1b" in text or text in shown) and len(shown) < 20_000


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_node_tells_of_itself_is_text(text: str) -> None:
    """One node's name for its device does not take the list of all from an operator."""
    info = NodeInfo("0.1.0", "3.11", text, "cpu", None, {"tiny": None}, NodeLimits(2**30, 2**20, 16), {}, {"site": text})
    node = NodeView(id=NODE, state="ready", boot=1, conn=1, seen=1.0, info=info, heartbeat=None, drain=None, drain_command=0, told=0)
    assert _harmless(_shown(nodes_table([node])), text)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_node_tells_of_a_job_is_text(text: str) -> None:
    """The names of stages come from the node, whatever its trainer is."""
    out = io.StringIO()
    resources = Resources(NONE, NONE, 1, 1, 1, None, NONE, NONE, NONE)
    told = JobProgress(Event(time=1.0, event="progress", stage="train"), [StageDone(text, 1.0, 5)], resources)
    FleetView(Console(file=out, width=200)).tell(told)
    assert _harmless(out.getvalue(), text)
    assert out.getvalue().count("\n") == 1
