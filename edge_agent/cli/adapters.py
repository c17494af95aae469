"""What becomes of adapters: `edge-agent export | chat | merge | rollout merge`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import msgspec
import typer
from rich.console import Console

from edge_agent import dataset as datasets
from edge_agent.adapters.report import Base, Format, Merge, Method
from edge_agent.adapters.source import CONFIG, WEIGHTS, Source, find_source
from edge_agent.adapters.view import export_table, merge_view, replies_view
from edge_agent.cli.fleet import CoordinatorConfigOption, UrlOption, client_of
from edge_agent.cli.shared import (
    BudgetOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    QuestionsOption,
    VerifierOption,
    explained,
    imports,
    print_json,
)
from edge_agent.config import COORDINATOR_CONFIG
from edge_agent.errors import AdapterMismatch, JobSchema
from edge_agent.files import write_file
from edge_agent.hints import explain
from edge_agent.job_building import named_verifier
from edge_agent.messages import is_ulid
from edge_agent.sizes import parse_size

if TYPE_CHECKING:
    from edge_agent.coordinator.client import Client

FETCHED = (CONFIG, WEIGHTS, "result.json")
"""What a merge needs of a job at the coordinator; nothing else is asked for."""
LOOK_S = 2.0
"""Between two looks at a rollout that runs."""

AdapterArgument = Annotated[
    Path | None, typer.Argument(metavar="[DIR]", help="A finished job, one that was fetched, a merge, or an adapter/ alone.")
]
BaseOption = Annotated[
    str | None, typer.Option("--model", help="The base model, where it is not here under the name that it had for the job.")
]
OutOption = Annotated[Path, typer.Option("--out", help="The directory to write, which is not there yet.")]
PromptsOption = Annotated[str | None, typer.Option("--prompts", help="worked (default) or plain; without it those of the job.")]
TokensOption = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer (default: as the job measures).")]
MethodOption = Annotated[str, typer.Option("--method", help=f"{', '.join(get_args(Method))}; see docs/adapters.md.")]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="W,W,...", help="One for each adapter, in any scale; default: by the questions of their training."),
]
DensityOption = Annotated[float, typer.Option("--density", help="Share of the numbers that TIES and DARE keep.")]
RankOption = Annotated[int | None, typer.Option("--rank", min=1, help="Of a method that ends in svd (default: the largest of the parts).")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of what DARE drops.")]
EvaluateOption = Annotated[
    Path | None, typer.Option("--evaluate", metavar="FILE", help="Questions to measure the base model, every part and the merge on.")
]


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A finished job, one that was fetched, a merge, or an adapter/ alone.")],
    out: OutOption,
    form: Annotated[
        str, typer.Option("--format", help="merged (weights that plain transformers loads), adapter (PEFT's files), or gguf (llama.cpp).")
    ] = "merged",
    model: BaseOption = None,
    base: Annotated[
        str,
        typer.Option("--base", help="Merge into the weights as they are stored, or nf4: rounded to 4 bits, as they were trained with."),
    ] = "stored",
    as_json: JsonOption = False,
) -> None:
    """Write an adapter for use elsewhere: merged into its base model, as PEFT's own files, or as a LoRA file of llama.cpp."""
    with explained(as_json):
        chosen, weights = _one_of(form, Format, "--format"), _one_of(base, Base, "--base")
        if weights != "stored" and chosen != "merged":
            raise typer.BadParameter("--base belongs to --format merged")
        source = find_source(directory)
        with imports():
            from edge_agent.adapters.export import export as write

        report = write(source, model, out, chosen, weights)
        if as_json:
            print_json(report)
        else:
            Console().print(export_table(report, out), highlight=False)


def chat(
    directory: AdapterArgument = None,
    model: ModelOption = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="With --model: the adapter/ to try beside it.")] = None,
    question: Annotated[
        str | None, typer.Option("--question", help="Ask this and end; without it questions are read line by line.")
    ] = None,
    prompts: PromptsOption = None,
    max_new_tokens: TokensOption = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.01, max=4, help="Sample; without it greedy.")] = None,
    budget: BudgetOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a base model and its adapter the same questions, in 4 bits and with the prompts of the job: what evaluation measured.

    Each question stands alone; an empty line or Ctrl-D ends. With --json each is answered by one JSON document.
    """
    with explained(as_json):
        place = directory or adapter
        if (directory is not None and adapter is not None) or (place is None and model is None):
            raise typer.BadParameter("give the directory of a job, or --model and perhaps --adapter")
        budget_bytes = parse_size(budget) if budget else None
        with imports():
            from edge_agent.adapters.chat import chat as begin
            from edge_agent.adapters.chat import settings_of

        console = Console(stderr=as_json)
        with begin(place, model, lambda source: settings_of(source, prompts, max_new_tokens, temperature, device, budget_bytes)) as ask:
            for text in [question] if question is not None else _questions(console):
                replies = ask(text)
                if as_json:
                    print_json(replies)
                    sys.stdout.flush()
                else:
                    console.print(replies_view(replies))


def _questions(console: Console) -> Iterator[str]:
    """Yield what is typed, or comes through a pipe, until an empty line."""
    while True:
        try:
            text = console.input("[bold]question>[/] " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        yield text


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="JOB|DIR...", help="Two or more: directories as for export, or ids of jobs at the coordinator.")
    ],
    out: OutOption,
    method: MethodOption = "cat",
    weights: WeightsOption = None,
    density: DensityOption = 0.5,
    rank: RankOption = None,
    seed: SeedOption = 42,
    evaluate: EvaluateOption = None,
    questions: QuestionsOption = None,
    verifier: VerifierOption = None,
    prompts: PromptsOption = None,
    max_new_tokens: TokensOption = None,
    model: BaseOption = None,
    device: DeviceOption = None,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters that were trained on different nodes for one base model, and measure the result beside the model and each of them.

    The default, cat, is their exact average; the rank of the result is the sum of theirs. Of a job at the coordinator adapter and
    report are fetched, and nothing of its dataset.
    """
    with explained(as_json), tempfile.TemporaryDirectory(prefix="edge-agent-merge-") as fetched:
        ids = [name for name in adapters if is_ulid(name) and not Path(name).exists()]
        if ids:
            with client_of(config, url) as client:
                for job in ids:
                    _fetch(client, job, Path(fetched) / job)
        places = [(Path(fetched) / name, name) if name in ids else (Path(name), name) for name in adapters]
        given = {"questions": questions, "verifier": named_verifier(verifier), "max_new_tokens": max_new_tokens}
        options = _options(method, weights, density, rank, seed, device)
        _merge([find_source(place, name) for place, name in places], out, options, evaluate, given, prompts, model, as_json)


def rollout_merge(
    rollout: Annotated[str, typer.Argument(help="The rollout's id.")],
    out: OutOption,
    method: MethodOption = "cat",
    weights: WeightsOption = None,
    density: DensityOption = 0.5,
    rank: RankOption = None,
    seed: SeedOption = 42,
    evaluate: EvaluateOption = None,
    questions: QuestionsOption = None,
    verifier: VerifierOption = None,
    prompts: PromptsOption = None,
    max_new_tokens: TokensOption = None,
    model: BaseOption = None,
    device: DeviceOption = None,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Wait for the end of a rollout, then merge the adapters of its jobs that have succeeded, here, as `edge-agent merge` does."""
    with explained(as_json), tempfile.TemporaryDirectory(prefix="edge-agent-merge-") as fetched:
        with client_of(config, url) as client:
            jobs = _jobs_of(client, rollout, Console(stderr=True))
            for job in jobs:
                _fetch(client, job, Path(fetched) / job)
        given = {"questions": questions, "verifier": named_verifier(verifier), "max_new_tokens": max_new_tokens}
        options = _options(method, weights, density, rank, seed, device)
        _merge([find_source(Path(fetched) / job, job) for job in jobs], out, options, evaluate, given, prompts, model, as_json)


def _merge(
    sources: Sequence[Source], out: Path, options: dict[str, Any], evaluate: Path | None, given: dict[str, Any], prompts: str | None,
    model: str | None, as_json: bool,
) -> None:  # fmt: skip
    records = datasets.read_records(evaluate) if evaluate else []
    with imports():
        from edge_agent.adapters.merge import Options, questions_of
        from edge_agent.adapters.merge import merge as combine

    try:
        wanted = msgspec.convert(options, type=Options)
    except msgspec.ValidationError as error:
        raise JobSchema("options", explain(error, Options)) from None
    questions = questions_of(sources, records, given, prompts) if evaluate else None
    console = Console(stderr=as_json)
    report: Merge = combine(sources, model, out, wanted, questions, _told(console))
    if as_json:
        print_json(report)
    else:
        console.print(merge_view(report, out))


def _told(console: Console) -> Callable[[str, int, int], None]:
    """Return what says that a model has been measured."""

    def tell(name: str, done: int, total: int) -> None:
        if done == total:
            console.print(f"[green]✓[/] {name}: {total:,} questions answered", highlight=False)

    return tell


def _options(method: str, weights: str | None, density: float, rank: int | None, seed: int, device: str | None) -> dict[str, Any]:
    try:
        numbers = [float(part) for part in weights.split(",")] if weights else []
    except ValueError:
        raise typer.BadParameter(f"--weights is like 2,1,1, not {weights!r}") from None
    return {"method": method, "weights": numbers, "density": density, "rank": rank, "seed": seed, "device": device or "auto"}


def _one_of(text: str, kind: Any, option: str) -> Any:
    if text not in get_args(kind):
        raise typer.BadParameter(f"{option} is one of {', '.join(get_args(kind))}, not {text!r}")
    return text


def _fetch(client: Client, job: str, directory: Path) -> None:
    """Write adapter, report and document of a job into a directory."""
    client.fetch(job, directory, FETCHED)
    write_file(directory / "job.json", msgspec.json.encode(client.job(job).order.job))


def _jobs_of(client: Client, rollout: str, console: Console) -> list[str]:
    """Return the jobs of a rollout that have succeeded, in the order of its nodes, once it has ended and none of them is open.

    Raises AdapterMismatch where there are less than two.
    """
    waits = False
    while (view := client.rollout(rollout)).state == "running" or view.counts.open:
        if not waits:
            console.print(f"rollout {rollout} goes on; waiting for its end", highlight=False)
            waits = True
        time.sleep(LOOK_S)
    nodes = client.rollout_nodes(rollout, view.nodes)
    jobs = [node.job for node in nodes if node.outcome == "succeeded" and node.job is not None and node.phase == "ended"]
    if len(jobs) < 2:
        raise AdapterMismatch(
            Path(rollout), f"{len(jobs)} of the {view.nodes} jobs of the rollout have succeeded; a merge takes two or more"
        )
    return jobs
