"""The command line: `edge-agent train | evaluate | plan | dataset check | demo`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from edge_agent import dataset as datasets
from edge_agent.console import LiveView, format_accuracy, plan_table, printable, summary
from edge_agent.errors import DatasetEmpty, EdgeAgentError
from edge_agent.job import Job
from edge_agent.job_building import build_job, parse_size
from edge_agent.job_directory import JobDirectory

EXIT_CODES = """
Exit codes: 0 success, 1 internal error, 2 wrong usage, 3 dataset, 4 job or directory, 5 model or adapter, 6 does not fit the
budget or the free memory, 7 out of memory, 8 disk full, 9 loss not finite, 10 time limit,
11 no such device, 130 interrupted (run again to go on).
"""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Fine-tunes a language model in 4 bits under a memory budget, by Natural Language Fine-Tuning.", epilog=EXIT_CODES,
)  # fmt: skip
dataset_app = typer.Typer(no_args_is_help=True, help="Look at datasets.")
app.add_typer(dataset_app, name="dataset")

ModelOption = Annotated[
    str | None, typer.Option("--model", help="A model directory, or the id of a model in the local Hugging Face cache.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="JSONL file of {question, answer[, output, judgment, id]} records.")]
EvalDataOption = Annotated[
    Path | None, typer.Option("--eval-data", help="JSONL file of the questions to measure on; default: hold some out.")
]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Memory that the run may take, such as 6GiB.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Train on this many questions, drawn by the seed.")]
QuestionsOption = Annotated[int | None, typer.Option("--questions", help="Measure on at most this many held-out questions.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any other field of the job, such as schedule.updates=60 or method.cluster=like; repeatable. See docs/job.md."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
DirectoryArgument = Annotated[Path | None, typer.Argument(help="A job directory, instead of --model, --data and --out.")]


@contextmanager
def _explained(as_json: bool) -> Iterator[None]:
    """Turn an error into one readable line (or JSON document) and its exit code."""
    try:
        yield
    except EdgeAgentError as error:
        _print_error(error.code, str(error), as_json)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        _print_error(EdgeAgentError.code, f"{type(error).__name__}: {error}", as_json)
        Console(stderr=True).print_exception()
        raise typer.Exit(EdgeAgentError.exit_code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None


def _print_error(code: str, text: str, as_json: bool) -> None:
    if as_json:
        _print_json({"error": {"code": code, "text": text}})
    else:
        line = Text.assemble(("error ", "bold red"), (code, "red"), f": {printable(text)}")
        Console(stderr=True).print(line, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")


@app.callback()
def _offline() -> None:
    """Nothing is fetched while a job runs: no weights, no kernels."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would warn that it fetched no kernels


@app.command(epilog=EXIT_CODES)
def train(
    directory: DirectoryArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The job directory to write; run again to go on after an interruption.")] = None,
    budget: BudgetOption = None,
    eval_data: EvalDataOption = None,
    limit: LimitOption = None,
    questions: QuestionsOption = None,
    method: Annotated[str | None, typer.Option("--method", help="nlft (default) or sft.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the samples (default 3).")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate (default 2e-4).")] = None,
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", help="Rank of the adapter (default 16).")] = None,
    verifier: Annotated[str | None, typer.Option("--verifier", help="numeric (default), exact or choice.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of split, sampling, adapter and order (default 42).")] = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model on a dataset under a memory budget, and measure it before and after.

    Give --model, --data, --budget and --out, or the directory of a job to run it (again). Records that have only questions and
    answers are completed by the model itself; held-out questions are never trained on.
    """
    with _explained(as_json):
        job: Job | None = None
        if directory is None:
            if model is None or data is None or budget is None or out is None:
                raise typer.BadParameter("give --model, --data, --budget and --out, or a job directory")
            fields = {
                "budget_bytes": parse_size(budget), "dataset.limit": limit, "evaluation.questions": questions,
                "method.name": method or "nlft",
                "schedule.epochs": epochs, "schedule.learning_rate": learning_rate, "lora.rank": lora_rank,
                "evaluation.verifier": verifier, "seed": seed, "device": device,
            }  # fmt: skip
            job = build_job(model, data, eval_data, fields, settings or [])
            for file in (data, eval_data):
                if file is not None:
                    datasets.read_records(file)
            directory = out
            JobDirectory(directory).create(job, data, eval_data)
        else:
            _only_directory(
                model,
                data,
                out,
                budget,
                eval_data,
                limit,
                questions,
                method,
                epochs,
                learning_rate,
                lora_rank,
                verifier,
                seed,
                device,
                settings,
            )
        _run(JobDirectory(directory), job, as_json)


def _only_directory(*options: object) -> None:
    """A job directory says everything about its job."""
    if any(option is not None for option in options):
        raise typer.BadParameter("a job directory takes no other options; start a new job with --model, --data, --budget and --out")


def _run(directory: JobDirectory, job: Job | None, as_json: bool) -> None:
    from edge_agent.training.run import run_job

    if as_json:
        _print_json(run_job(directory, lambda event: None, job))
        return
    console = Console()
    with LiveView(console) as view:
        result = run_job(directory, view, job)
    console.print(summary(result, directory.path))


@app.command(epilog=EXIT_CODES)
def plan(
    directory: DirectoryArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    budget: BudgetOption = None,
    eval_data: EvalDataOption = None,
    limit: LimitOption = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a job would take, stage by stage, and on which settings it fits the budget; nothing is loaded or trained."""
    with _explained(as_json):
        from edge_agent.training.prepare import prepare_files

        if directory is not None:
            _only_directory(model, data, budget, eval_data, limit, device, settings)
            source = JobDirectory(directory)
            job = source.read_job()
            prepared = prepare_files(job, *source.read_dataset(job))
        else:
            if model is None or data is None or budget is None:
                raise typer.BadParameter("give --model, --data and --budget, or a job directory")
            fields = {"budget_bytes": parse_size(budget), "dataset.limit": limit, "method.name": "nlft", "device": device}
            job = build_job(model, data, eval_data, fields, settings or [])
            prepared = prepare_files(job, datasets.read_records(data), datasets.read_records(eval_data) if eval_data else None)
        made = prepared.plan()
        if as_json:
            _print_json(made)
        else:
            Console().print(plan_table(made))


@app.command(epilog=EXIT_CODES)
def evaluate(
    directory: DirectoryArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="The adapter/ of a job; without it the base model is measured.")] = None,
    questions: QuestionsOption = None,
    verifier: Annotated[str | None, typer.Option("--verifier", help="numeric (default), exact or choice.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer (default 256).")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Questions generated at once (default 64).")] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy of a model, with or without an adapter, by real generation.

    Give the directory of a finished job to measure its adapter again on its held-out questions, or --model and --data.
    """
    with _explained(as_json):
        from edge_agent.training.measure import measure_files, measure_job

        if directory is not None:
            _only_directory(model, data, adapter, questions, verifier, max_new_tokens, batch, device)
            measured = measure_job(JobDirectory(directory))
        elif model is not None and data is not None:
            given = {"questions": questions, "verifier": verifier, "max_new_tokens": max_new_tokens, "batch": batch}
            options = {"questions": datasets.MAX_RECORDS} | {name: value for name, value in given.items() if value is not None}
            measured = measure_files(model, datasets.read_records(data), adapter, options, device or "auto")
        else:
            raise typer.BadParameter("give a job directory, or --model and --data")
        if as_json:
            _print_json(measured)
        else:
            Console().print(
                f"{format_accuracy(measured.accuracy)}  [dim]({measured.tokens:,} tokens in {measured.seconds:.1f} s)[/]", highlight=False
            )


@dataset_app.command("check", epilog=EXIT_CODES)
def dataset_check(
    file: Annotated[Path, typer.Argument(help="The JSONL file.")],
    as_json: JsonOption = False,
) -> None:
    """Read a dataset strictly and say what is in it, or which line is wrong and why."""
    with _explained(as_json):
        if not file.is_file():
            raise DatasetEmpty(str(file), "does not exist")
        found = datasets.check(file)
        if as_json:
            _print_json(found)
            return
        for name, value in msgspec.structs.asdict(found).items():
            typer.echo(f"{name.replace('_', ' '):<20}{value:,}" if isinstance(value, int) else f"{name:<20}{value}")


@app.command(epilog=EXIT_CODES)
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the demo's jobs and report.json go.")] = Path("build/demo"),
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=20, help="How many seeds to run.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Train the shipped tiny model on domains that it has not seen: base, SFT and NLFT compared on the same questions."""
    with _explained(as_json):
        from edge_agent.demo.tour import run_demo

        report = run_demo(out, seeds, Console(stderr=as_json))
        if as_json:
            _print_json(report)
        if not report.holds:
            raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
