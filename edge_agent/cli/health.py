"""Commands that say whether a daemon of this machine lives, for whoever starts it anew: `health node | coordinator`."""

from __future__ import annotations

import typer

from edge_agent.cli.fleet import AgentConfigOption, CoordinatorConfigOption
from edge_agent.cli.shared import explained
from edge_agent.config import AGENT_CONFIG, COORDINATOR_CONFIG, CoordinatorConfig, read_config


def node(config: AgentConfigOption = AGENT_CONFIG) -> None:
    """Say whether the agent lives: its process is there, and its loop has turned in the last two minutes.

    A broker that is away, or no coordinator, is told, and no fault of the agent.
    """
    from edge_agent.alive import main

    raise typer.Exit(main(["--config", str(config)]))


def coordinator(config: CoordinatorConfigOption = COORDINATOR_CONFIG) -> None:
    """Say whether the coordinator lives: a request on its socket is answered, from its loop and its database."""
    with explained(False):
        from edge_agent.coordinator.client import Client

        with Client.local(read_config(config, CoordinatorConfig).state_directory) as client:
            client.answers()
        typer.echo("it answers")
