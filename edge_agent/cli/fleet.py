"""Commands of a fleet: the daemons `run` and `coordinator`, and `submit | nodes | jobs | watch | options | cancel | fetch | doctor`."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from edge_agent import dataset as datasets
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
from edge_agent.config import (
    AGENT_CONFIG,
    AUTHORITY_VARIABLE,
    COORDINATOR_CONFIG,
    TOKEN_VARIABLE,
    URL_VARIABLE,
    CoordinatorConfig,
    read_config,
)
from edge_agent.console import FleetView, checks_table, jobs_table, nodes_table, options_line, printable, summary
from edge_agent.coordinator.rollout import Selector
from edge_agent.coordinator.views import JobFilter
from edge_agent.errors import NOT_ACCEPTED_EXIT_CODE, EdgeAgentError, JobEnded
from edge_agent.job import Job
from edge_agent.job_building import build_change, build_job
from edge_agent.messages import LONGEST_ORDER_S, ORDER_S
from edge_agent.sizes import parse_size

AgentConfigOption = Annotated[Path, typer.Option("--config", help="The agent's configuration; see docs/config.md.")]
CoordinatorConfigOption = Annotated[
    Path,
    typer.Option("--config", envvar="EDGE_AGENT_COORDINATOR", help="The coordinator's configuration, which names its state directory."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--coordinator", envvar=URL_VARIABLE, metavar="URL",
        help=f"A coordinator elsewhere, instead of --config. The file with its token: {TOKEN_VARIABLE}, else ~/.config/edge-agent/token.",
    ),
]  # fmt: skip
NodeArgument = Annotated[str, typer.Argument(help="The node's name.")]
JobArgument = Annotated[str, typer.Argument(help="The job's id.")]
ModelOption = Annotated[str, typer.Option("--model", help="A model, by the name under which nodes have it: `edge-agent nodes` shows them.")]
MethodOption = Annotated[str, typer.Option("--method", help="nlft, sft, dft, cut or reft.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of split, sampling, adapter and order (default 42).")]
PriorityOption = Annotated[int, typer.Option("--priority", min=0, max=9, help="Jobs of a higher one run first.")]
ExpiryOption = Annotated[
    float, typer.Option("--expires-s", min=1, max=LONGEST_ORDER_S, help="Give up if the node has not answered by then.")
]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=TEXT", help="Only nodes that have this label; repeatable, all must hold.")
]
FingerprintOption = Annotated[str | None, typer.Option("--fingerprint", help="Only nodes whose model of that name has this fingerprint.")]


def run(config: AgentConfigOption = AGENT_CONFIG) -> None:
    """Be a node: take jobs from the broker, run them one at a time, hand in their results, until SIGTERM or Ctrl-C."""
    from edge_agent.agent import main

    raise typer.Exit(main(["--config", str(config)]))


def coordinator(config: CoordinatorConfigOption = COORDINATOR_CONFIG) -> None:
    """Be the coordinator: offer jobs to nodes, keep their results, answer the commands below, until SIGTERM or Ctrl-C."""
    with explained(False):
        from edge_agent import logs
        from edge_agent.coordinator.file_server import files_served
        from edge_agent.coordinator.http import api_served, serve
        from edge_agent.coordinator.service import Service

        logs.set_up()
        read = read_config(config, CoordinatorConfig)
        service = Service(read)
        service.start()
        try:
            with files_served(service, read.https), api_served(service, read.api):
                gc.freeze()  # what is there by now stays: looking through it held up answers for some 80 ms again and again
                serve(service, read.state_directory)
        finally:
            service.stop()


def doctor(config: AgentConfigOption = AGENT_CONFIG, as_json: JsonOption = False) -> None:
    """Check all that a node needs, from its device, in 4 bits, to the coordinator and back, its clock and the broker's access rules.

    Each check does the thing. Where one fails it says what to do.
    """
    with explained(as_json):
        from edge_agent.doctor import examine

        logging.getLogger("edge_agent.mqtt").setLevel(logging.CRITICAL)  # that one connection ends another is what it looks for
        checks = examine(config)
        if as_json:
            print_json(checks)
        else:
            Console().print(checks_table(checks))
        if not all(check.passed for check in checks):
            raise typer.Exit(EdgeAgentError.exit_code)


def nodes(config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """List the nodes that the coordinator knows."""
    with explained(as_json), client_of(config, url) as client:
        found = client.nodes()
        if as_json:
            print_json(found)
        else:
            Console().print(nodes_table(found))


def jobs(
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Show at most this many, the newest first.")] = 30,
    node: Annotated[str | None, typer.Option("--node", help="Only those of this node.")] = None,
    rollout: Annotated[str | None, typer.Option("--rollout", help="Only those of this rollout.")] = None,
    phase: Annotated[str | None, typer.Option("--phase", help="Only those in this phase, such as running; see docs/fleet.md.")] = None,
    outcome: Annotated[str | None, typer.Option("--outcome", help="Only those with this outcome, such as failed.")] = None,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    with explained(as_json), client_of(config, url) as client:
        which = JobFilter(phase=phase, outcome=outcome, node=node, rollout=rollout)  # type: ignore[arg-type]  # the coordinator looks
        found = client.jobs(limit, which)
        if as_json:
            print_json(found)
        else:
            Console().print(jobs_table(found))


def submit(
    model: ModelOption,
    node: Annotated[str | None, typer.Option("--node", help="The node that is to run the job; default: the best one.")] = None,
    labels: LabelOption = None,
    fingerprint: FingerprintOption = None,
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
    """Send a job to a node and print its id. The dataset travels with it; `edge-agent watch` shows how it goes.

    Without --node the coordinator chooses, of the nodes that are ready and can have the job, the one with the fewest jobs, then with
    the most free memory, then the fastest.
    """
    with explained(as_json), client_of(config, url) as client:
        if node is not None and (labels or fingerprint):
            raise typer.BadParameter("--label and --fingerprint choose a node, and --node names it")
        fields = {"dataset.limit": limit, "evaluation.questions": questions, "method.name": method, "seed": seed, "device": device}
        job, files = job_of(model, data, eval_data, budget, fields, settings)
        selector = selector_of(labels, (), fingerprint) if node is None else None
        view = client.submit(node, job, files, priority, expires_s, selector)
        if as_json:
            print_json(view)
        else:
            if view.placed is not None:
                Console(stderr=True).print(Text(printable(f"to {view.placed.node}: {view.placed.why}")), soft_wrap=True)
            typer.echo(view.id)


def job_of(
    model: str, data: Path | None, eval_data: Path | None, budget: str | None, fields: dict[str, Any], settings: list[str] | None
) -> tuple[Job, dict[str, Path]]:
    """Return the job that options describe, and its files by their sha256. Raises a DatasetError for what cannot be trained on."""
    if data is None or budget is None:
        raise typer.BadParameter("give --data and --budget")
    job = build_job(model, data, eval_data, {"budget_bytes": parse_size(budget), **fields}, settings or [])
    files = {job.dataset.sha256: data}
    if eval_data is not None and job.dataset.evaluation_sha256 is not None:
        files[job.dataset.evaluation_sha256] = eval_data
    for file in files.values():
        datasets.read_records(file)
    return job, files


def selector_of(labels: list[str] | None, nodes: Sequence[str], fingerprint: str | None) -> Selector:
    """Return the selector that options describe."""
    pairs = [label.partition("=") for label in labels or ()]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise typer.BadParameter(f"--label is like NAME=TEXT, not {wrong[0]!r}")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise typer.BadParameter("a node has one text for a label; give each --label once")
    fields = {"labels": {name: text for name, _, text in pairs}, "nodes": nodes, "model_fingerprint": fingerprint}
    try:
        return msgspec.convert(fields, Selector)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error)) from None


def watch(
    job: JobArgument, config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """Show a job live until it has ended, then its summary. Exits as a local run of the job would."""
    with explained(as_json), client_of(config, url) as client:
        console = Console(stderr=as_json)
        try:
            with FleetView(console) as view:
                for item in client.watch(job):
                    view.tell(item)
        except KeyboardInterrupt:
            console.print(f"the job goes on; `edge-agent watch {job}` shows it again, `edge-agent cancel {job}` ends it", highlight=False)
            raise typer.Exit(130) from None
        ended = client.job(job)
        if as_json:
            print_json(ended)
        elif result := client.result(ended):
            console.print(summary(result, None))
        if ended.outcome != "succeeded":
            raise JobEnded(job, ended.outcome or "", ended.reason or "internal", ended.text or "no more is known")
        if ended.result is not None and ended.result.accepted is False:
            raise typer.Exit(NOT_ACCEPTED_EXIT_CODE)


def cancel(
    job: JobArgument, config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """Ask for the end of a job. Its outcome is `canceled`, or whatever was faster."""
    with explained(as_json), client_of(config, url) as client:
        view = client.cancel(job)
        if as_json:
            print_json(view)
        else:
            typer.echo(f"{view.id}  {view.outcome or 'cancel requested'}")


def options(
    job: JobArgument,
    settings: SetOption = None,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have an NLFT job go on with other options while it runs, or without --set say what it was sent and what its trainer has taken."""
    with explained(as_json), client_of(config, url) as client:
        view = client.send_options(job, build_change(settings)) if settings else client.job(job)
        if as_json:
            print_json(view)
        else:
            typer.echo(f"{view.id}  {options_line(view)}")


def retry(
    job: JobArgument, config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """Hand in an ended job again and print the id of the new one."""
    with explained(as_json), client_of(config, url) as client:
        view = client.retry(job)
        if as_json:
            print_json(view)
        else:
            typer.echo(view.id)


def forget(
    job: JobArgument, config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """Delete an ended job with its dataset, report and adapter, at the coordinator and on its node, now or when that is back."""
    with explained(as_json), client_of(config, url) as client:
        view = client.forget(job)
        if as_json:
            print_json(view)
        else:
            typer.echo(f"{view.id}  deleted as soon as node {view.node} has done so")


def drain(
    node: NodeArgument, config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """Have a node finish the jobs that it has and take no new ones, now or when it is back, until `resume`."""
    _set_drain(node, True, config, url, as_json)


def resume(
    node: NodeArgument, config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """Have a node take jobs again."""
    _set_drain(node, False, config, url, as_json)


def _set_drain(node: str, wanted: bool, config: Path, url: str | None, as_json: bool) -> None:
    with explained(as_json), client_of(config, url) as client:
        view = client.drain(node, wanted)
        if as_json:
            print_json(view)
        else:
            typer.echo(f"{view.id}  to {'drain' if wanted else 'take jobs'}; it is {view.state} now")


def fetch(
    job: JobArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where adapter/ and result.json go; default: a directory named by the id.")
    ] = None,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the adapter and the report of an ended job into a directory."""
    with explained(as_json), client_of(config, url) as client:
        directory = out or Path(job)
        written = client.fetch(job, directory)
        if as_json:
            print_json({"job": job, "files": [str(file) for file in written]})
        else:
            for file in written:
                typer.echo(str(file))


def client_of(config: Path, url: str | None):  # type: ignore[no-untyped-def]  # its type is imported with it: httpx is of no use to the other commands
    """Return the client of the coordinator that a configuration is of, or of that at a URL."""
    from edge_agent.coordinator.client import Client

    if url is None:
        return Client.local(read_config(config, CoordinatorConfig).state_directory)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    token_file = Path(os.environ.get(TOKEN_VARIABLE) or home / "edge-agent" / "token")
    authority = os.environ.get(AUTHORITY_VARIABLE)
    return Client.remote(url, token_file.expanduser(), Path(authority).expanduser() if authority else None)
