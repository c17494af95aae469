"""Commands of rollouts, one job for many nodes: `rollout submit | list | show | cancel`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from edge_agent.cli.fleet import (
    CoordinatorConfigOption,
    ExpiryOption,
    FingerprintOption,
    LabelOption,
    MethodOption,
    ModelOption,
    PriorityOption,
    SeedOption,
    UrlOption,
    client_of,
    job_of,
    selector_of,
)
from edge_agent.cli.shared import (
    BudgetOption,
    DataOption,
    DeviceOption,
    EvalDataOption,
    JsonOption,
    LimitOption,
    QuestionsOption,
    SetOption,
    explained,
    print_json,
)
from edge_agent.config import COORDINATOR_CONFIG
from edge_agent.console import choice_table, rollout_view, rollouts_table
from edge_agent.coordinator.rollout import Abort, Exponential, Rate, RolloutPlan
from edge_agent.messages import ORDER_S

RolloutArgument = Annotated[str, typer.Argument(help="The rollout's id.")]


def submit(
    model: ModelOption,
    labels: LabelOption = None,
    nodes: Annotated[list[str] | None, typer.Option("--node", help="Instead of labels: this node; repeatable, in this order.")] = None,
    fingerprint: FingerprintOption = None,
    per_minute: Annotated[int, typer.Option("--per-minute", min=1, max=1000, help="Jobs that are made in a minute, at most.")] = 60,
    base_per_minute: Annotated[
        int | None, typer.Option("--base-per-minute", min=1, max=1000, help="Begin with so many a minute; more come with success.")
    ] = None,
    increment_factor: Annotated[
        float, typer.Option("--increment-factor", min=1.1, max=5, help="What the rate is multiplied by, up to --per-minute.")
    ] = 2.0,
    increment_after: Annotated[
        int, typer.Option("--increment-after", min=1, max=1_000_000, help="Multiply it whenever so many more jobs have succeeded.")
    ] = 10,
    abort_above: Annotated[
        float | None, typer.Option("--abort-above", min=0, max=0.99, help="Abort when more than this share of the ended jobs has failed.")
    ] = None,
    abort_after: Annotated[
        int, typer.Option("--abort-after", min=1, max=1_000_000, help="Do not abort before so many jobs have ended.")
    ] = 10,
    each_seed: Annotated[
        bool,
        typer.Option("--each-seed", help="Each node draws with a seed of its own: the job's, and one more for every node before it."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which nodes it would have, and why not the others.")] = False,
    data: DataOption = None,
    budget: BudgetOption = None,
    eval_data: EvalDataOption = None,
    limit: LimitOption = None,
    questions: QuestionsOption = None,
    method: MethodOption = "nlft",
    seed: SeedOption = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    priority: PriorityOption = 4,
    expires_s: ExpiryOption = ORDER_S,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give one job to all nodes that are ready and can have it now, one after the other, and print the id of the rollout.

    With --label only to nodes that have all these labels, with --node only to these.
    """
    with explained(as_json), client_of(config, url) as client:
        if labels and nodes:
            raise typer.BadParameter("give --label or --node, not both")
        if base_per_minute is not None and base_per_minute > per_minute:
            raise typer.BadParameter("--base-per-minute is at most --per-minute")
        fields = {"dataset.limit": limit, "evaluation.questions": questions, "method.name": method, "seed": seed, "device": device}
        job, files = job_of(model, data, eval_data, budget, fields, settings)
        grown = {"increment_factor": increment_factor, "succeeded": increment_after}
        exponential = None if base_per_minute is None else Exponential(base_per_minute=base_per_minute, **grown)  # type: ignore[arg-type]
        plan = RolloutPlan(
            job=job, selector=selector_of(labels, nodes or (), fingerprint), priority=priority, expires_s=expires_s,
            seeds="each" if each_seed else "same", rate=Rate(maximum_per_minute=per_minute, exponential=exponential),
            abort=None if abort_above is None else Abort(minimum_ended=abort_after, threshold=abort_above),
        )  # fmt: skip
        made = client.roll_out(plan, files, dry_run)
        if as_json:
            print_json(made)
        elif made.rollout is None:
            Console().print(choice_table(made.choice))
        else:
            typer.echo(made.rollout.id)


def list_(
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Show at most this many, the newest first.")] = 30,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """List rollouts, the newest first."""
    with explained(as_json), client_of(config, url) as client:
        found = client.rollouts(limit)
        if as_json:
            print_json(found)
        else:
            Console().print(rollouts_table(found))


def show(
    rollout: RolloutArgument,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Show at most this many of its nodes.")] = 100,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show a rollout, and what has become of the job of each node."""
    with explained(as_json), client_of(config, url) as client:
        view, nodes = client.rollout(rollout), client.rollout_nodes(rollout, limit)
        if as_json:
            print_json({"rollout": view, "nodes": nodes})
        else:
            Console().print(rollout_view(view, nodes))


def cancel(
    rollout: RolloutArgument,
    force: Annotated[bool, typer.Option("--force", help="Cancel its jobs that run, too; also of a rollout that has ended.")] = False,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """End a rollout: no more jobs are made, those that no trainer has begun are canceled, those that run go on."""
    with explained(as_json), client_of(config, url) as client:
        view = client.cancel_rollout(rollout, force)
        if as_json:
            print_json(view)
        else:
            typer.echo(f"{view.id}  {view.state}")
