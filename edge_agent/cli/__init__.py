"""The command line. `edge-agent run` does not pass through here: edge_agent/__main__.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import typer

from edge_agent.cli import adapters, datasets, enroll, fleet, health, keys, local, models, rollouts, saliency, service, tokens, track
from edge_agent.cli.shared import EXIT_CODES
from profiles.memory import one_arena

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    help="Fine-tunes a language model in 4 bits under a memory budget, by Natural Language Fine-Tuning. To see it work: edge-agent demo.",
)  # fmt: skip
dataset_app = typer.Typer(no_args_is_help=True, help="Look at datasets, and build them.")
app.add_typer(dataset_app, name="dataset")
datasets_app = typer.Typer(no_args_is_help=True, help="List and remove the datasets that a coordinator has.")
app.add_typer(datasets_app, name="datasets")
enroll_app = typer.Typer(no_args_is_help=True, help="Make the certificates by which a broker, a coordinator and nodes know each other.")
app.add_typer(enroll_app, name="enroll")
health_app = typer.Typer(no_args_is_help=True, help="Say whether a daemon of this machine lives.")
app.add_typer(health_app, name="health")
keys_app = typer.Typer(no_args_is_help=True, help="Make and show the keys that sign orders.")
app.add_typer(keys_app, name="keys")
tokens_app = typer.Typer(no_args_is_help=True, help="Make, list and end the tokens by which a coordinator knows who asks.")
app.add_typer(tokens_app, name="tokens")
models_app = typer.Typer(no_args_is_help=True, help="Bring models to this node, list, check and remove them.")
app.add_typer(models_app, name="models")
rollout_app = typer.Typer(no_args_is_help=True, help="Give one job to many nodes, at a rate, until too many fail.")
app.add_typer(rollout_app, name="rollout")

PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "On this machine": (
        local.train,
        local.plan,
        local.evaluate,
        local.compare,
        saliency.saliency,
        adapters.chat,
        adapters.merge,
        adapters.export,
        local.demo,
    ),
    "On a node": (fleet.run, fleet.doctor, service.install_service),
    "Across a fleet": (
        fleet.coordinator,
        fleet.nodes,
        fleet.submit,
        fleet.jobs,
        fleet.watch,
        fleet.options,
        fleet.cancel,
        fleet.retry,
        fleet.fetch,
        track.track,
        fleet.forget,
        fleet.drain,
        fleet.resume,
        tokens.audit,
    ),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(epilog=EXIT_CODES, rich_help_panel=panel)(command)
dataset_app.command("check", epilog=EXIT_CODES)(local.dataset_check)
dataset_app.command("build", epilog=EXIT_CODES)(local.dataset_build)
for command in (enroll.node, enroll.coordinator, enroll.broker):
    enroll_app.command(epilog=EXIT_CODES)(command)
for command in (health.node, health.coordinator):
    health_app.command(epilog=EXIT_CODES)(command)
keys_app.command("new", epilog=EXIT_CODES)(keys.new)
keys_app.command("show", epilog=EXIT_CODES)(keys.show)
datasets_app.command("list", epilog=EXIT_CODES)(datasets.list_)
datasets_app.command("remove", epilog=EXIT_CODES)(datasets.remove)
models_app.command("add", epilog=EXIT_CODES)(models.add)
models_app.command("list", epilog=EXIT_CODES)(models.list_)
models_app.command("remove", epilog=EXIT_CODES)(models.remove)
models_app.command("verify", epilog=EXIT_CODES)(models.verify)
rollout_app.command("submit", epilog=EXIT_CODES)(rollouts.submit)
rollout_app.command("list", epilog=EXIT_CODES)(rollouts.list_)
rollout_app.command("show", epilog=EXIT_CODES)(rollouts.show)
rollout_app.command("cancel", epilog=EXIT_CODES)(rollouts.cancel)
rollout_app.command("merge", epilog=EXIT_CODES)(adapters.rollout_merge)
tokens_app.command("new", epilog=EXIT_CODES)(tokens.new)
tokens_app.command("list", epilog=EXIT_CODES)(tokens.list_)
tokens_app.command("revoke", epilog=EXIT_CODES)(tokens.revoke)


@app.callback()
def _environment(context: typer.Context) -> None:
    """Nothing is fetched but by `models`, least of all while a job runs: no weights, no kernels. Nobody is told of anything. And memory is
    counted.
    """
    one_arena()
    if context.invoked_subcommand != "models":
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Memory that PyTorch takes from the system anew for every large tensor (profiles/memory.py) comes in huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would warn that it fetched no kernels
