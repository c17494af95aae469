"""Commands on this machine: `edge-agent train | evaluate | compare | plan | dataset check | dataset build | demo`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from edge_agent import answers
from edge_agent import dataset as datasets
from edge_agent.cli.shared import (
    BudgetOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    DirectoryArgument,
    EvalDataOption,
    JsonOption,
    LimitOption,
    ModelOption,
    ProfileOption,
    QuestionsOption,
    SetOption,
    VerifierOption,
    explained,
    imports,
    print_json,
)
from edge_agent.config import (
    AGENT_CONFIG,
    CACHE_VARIABLE,
    JUDGES_VARIABLE,
    RAN_VARIABLE,
    AgentConfig,
    Endpoint,
    read_config,
    read_judges,
)
from edge_agent.console import LiveView, built_table, comparison_view, measurement_table, summary, survey_view
from edge_agent.dataset_check import check
from edge_agent.dataset_view import dataset_tables
from edge_agent.errors import NOT_ACCEPTED_EXIT_CODE, DatasetSchema, EdgeAgentError, JobSchema, Stopped
from edge_agent.files import write_file
from edge_agent.hints import explain
from edge_agent.job import Evaluation, Job, Judging
from edge_agent.job_building import build_job, build_options, named_verifier
from edge_agent.job_directory import JobDirectory
from edge_agent.json_items import MAX_RECORDS
from edge_agent.lockdown import Parts, close_network, describe, judge_ports, lock_down
from edge_agent.report import Event
from edge_agent.sizes import parse_size
from edge_agent.supervised import Supervision
from profiles.calibration import calibration_file
from profiles.device import device_profile


def train(
    directory: DirectoryArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The job directory to write; run again to go on after an interruption.")] = None,
    budget: BudgetOption = None,
    eval_data: EvalDataOption = None,
    limit: LimitOption = None,
    questions: QuestionsOption = None,
    method: Annotated[str | None, typer.Option("--method", help="nlft (default), sft, dft, cut or reft.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the samples (default 3).")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate (default 2e-4).")] = None,
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", help="Rank of the adapter (default 16).")] = None,
    verifier: VerifierOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of split, sampling, adapter and order (default 42).")] = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    config: ConfigOption = AGENT_CONFIG,
    supervised: Annotated[
        bool, typer.Option("--supervised", help="For agents: lock down; write events as JSON lines; stop when standard input ends.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write trace.json of the first updates, and on CUDA memory_snapshot.pickle, for their viewers.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model on a dataset under a memory budget, and measure it before and after.

    Give --model, --data, --budget and --out, or the directory of a job to run it (again). Records that have only questions and
    answers are completed by the model itself; held-out questions are never trained on.
    """
    with explained(as_json):
        job: Job | None = None
        if directory is None:
            if model is None or data is None or budget is None or out is None:
                raise typer.BadParameter("give --model, --data, --budget and --out, or a job directory")
            fields = {
                "budget_bytes": parse_size(budget), "dataset.limit": limit, "evaluation.questions": questions,
                "method.name": method or "nlft",
                "schedule.epochs": epochs, "schedule.learning_rate": learning_rate, "lora.rank": lora_rank,
                "evaluation.verifier": named_verifier(verifier), "seed": seed, "device": device,
            }  # fmt: skip
            job = build_job(model, data, eval_data, fields, settings or [])
            for file in (data, eval_data):
                if file is not None:
                    datasets.read_records(file)
            directory = out
            JobDirectory(directory).create(job, data, eval_data)
        else:
            _only_directory(
                model, data, out, budget, eval_data, limit, questions, method, epochs, learning_rate, lora_rank, verifier, seed, device,
                settings,
            )  # fmt: skip
        if supervised:
            _run_supervised(JobDirectory(directory), trace)
        else:
            _run(JobDirectory(directory), job, config, trace, as_json)


def _judges(judging: Judging, config: Path) -> Mapping[str, Endpoint]:
    """Return the endpoints of the configuration, which is read only where one is named."""
    return read_config(config, AgentConfig).judges if judging.endpoint else {}


def _only_directory(*options: object) -> None:
    """A job directory says everything about its job."""
    if any(option is not None for option in options):
        raise typer.BadParameter("a job directory takes no other options; start a new job with --model, --data, --budget and --out")


def _run_supervised(directory: JobDirectory, trace: bool) -> None:
    """Run under a daemon, locked down: it hears every event, and of an error before the first stage too."""
    judges = read_judges(os.environ.get(JUDGES_VARIABLE, "{}"))
    parts = lock_down(_own_places(directory), judge_ports(judge.url for judge in judges.values()) if judges else ())
    supervision = Supervision()  # it has a thread, which is locked down as well
    supervision.tell(_locked_down(parts))

    def tell(event: Event) -> None:
        supervision.tell(event)
        if judges and event.event == "stage_finished" and event.stage == "judge":
            supervision.tell(_locked_down({"network": close_network()}))

    try:
        with imports():
            from edge_agent.training.run import run_job

        ran_s = float(os.environ.get(RAN_VARIABLE, "0"))
        run_job(
            directory, tell, stopping=supervision.stopping, judges=judges, trace=trace, ran_s=ran_s, resting=supervision.resting,
            holds_gpu=True,
        )  # fmt: skip
    except Stopped:
        raise
    except EdgeAgentError as error:
        supervision.tell(Event(time=time.time(), event="failed", code=error.code, text=str(error)[:1024]))
        raise


def _locked_down(parts: Parts) -> Event:
    held = sum(why is None for why in parts.values())
    return Event(time=time.time(), event="locked_down", done=held, total=len(parts), text=describe(parts)[:1024])


def _own_places(directory: JobDirectory) -> list[Path]:
    """Return the directories that a trainer may write to; made where they are missing, for they are opened before it is locked down."""
    cache = Path(os.environ.get(CACHE_VARIABLE) or directory.path.absolute())
    temporary = cache / "temporary"
    shutil.rmtree(temporary, ignore_errors=True)  # of the trainer before; there is one at a time
    os.environ["TMPDIR"] = str(temporary)
    os.environ.setdefault("CUDA_CACHE_PATH", str(cache / "cuda"))
    places = [directory.path, calibration_file().parent, cache]
    for place in (*places[1:], temporary):
        with suppress(OSError, RuntimeError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return places


def _run(directory: JobDirectory, job: Job | None, config: Path, trace: bool, as_json: bool) -> None:
    judges = _judges((job or directory.read_job()).judging, config)
    with imports():
        from edge_agent.training.run import run_job

    if as_json:
        result = run_job(directory, lambda event: None, job, judges=judges, trace=trace)
        print_json(result)
    else:
        console = Console()
        with LiveView(console) as view:
            result = run_job(directory, view, job, judges=judges, trace=trace)
        console.print(summary(result, directory.path))
    if result.accepted is False:
        raise typer.Exit(NOT_ACCEPTED_EXIT_CODE)


def plan(
    directory: DirectoryArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    budget: BudgetOption = None,
    eval_data: EvalDataOption = None,
    limit: LimitOption = None,
    device: ProfileOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a job would take, stage by stage, and on which settings it fits the budget; nothing is loaded or trained.

    The model's weights need not be here: its config.json and its tokenizer will do.
    """
    with explained(as_json):
        profile = device_profile(device) if device not in (None, "auto") else None
        if directory is not None:
            _only_directory(model, data, budget, eval_data, limit, settings)
            source = JobDirectory(directory)
            job = source.read_job()
            records, questions = source.read_dataset(job)
        elif model is not None and data is not None and budget is not None:
            fields = {"budget_bytes": parse_size(budget), "dataset.limit": limit, "method.name": "nlft"}
            job = build_job(model, data, eval_data, fields, settings or [])
            records, questions = datasets.read_records(data), datasets.read_records(eval_data) if eval_data else None
        else:
            raise typer.BadParameter("give --model, --data and --budget, or a job directory")
        with imports():
            from edge_agent.training.prepare import prepare_files

        survey = prepare_files(job, records, questions, profile, weights=False).survey()
        if as_json:
            print_json(survey)
        else:
            Console().print(survey_view(survey), highlight=False)


def evaluate(
    directory: DirectoryArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="The adapter/ of a job; without it the base model is measured.")] = None,
    questions: QuestionsOption = None,
    verifier: VerifierOption = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="worked (default) or plain.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Answers sampled for each question (default 1); gives pass@k.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Of the sampling; without it answers are greedy.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampling (default 42).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer (default 256).")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Questions generated at once (default 64).")] = None,
    device: DeviceOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write every answer to this JSONL file, for `edge-agent compare`.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model, with or without an adapter, by real generation.

    Give the directory of a finished job to measure its adapter again on its held-out questions, or --model and --data.
    """
    with explained(as_json):
        if out is not None:
            answers.check_place(out)  # before hours of work, not after
        with imports():
            from edge_agent.training.measure import measure_files, measure_job

        if directory is not None:
            _only_directory(
                model, data, adapter, questions, verifier, prompts, samples, temperature, seed, max_new_tokens, batch, device
            )  # fmt: skip
            measured = measure_job(JobDirectory(directory))
        elif model is not None and data is not None:
            given = {
                "questions": questions, "verifier": named_verifier(verifier), "samples": samples, "temperature": temperature,
                "max_new_tokens": max_new_tokens, "batch": batch,
            }  # fmt: skip
            options = {"questions": MAX_RECORDS} | {name: value for name, value in given.items() if value is not None}
            records = datasets.read_records(data)
            measured = measure_files(
                model, records, adapter, prompts or "worked", options, 42 if seed is None else seed, device or "auto"
            )  # fmt: skip
        else:
            raise typer.BadParameter("give a job directory, or --model and --data")
        if out is not None:
            write_file(out, msgspec.json.Encoder().encode_lines(measured.answers))
        if as_json:
            print_json(measured)
        else:
            Console().print(measurement_table(measured.accuracy, measured.pass_at, measured.text, measured.cut_off), highlight=False)
            Console().print(f"[dim]{measured.tokens:,} tokens in {measured.seconds:.1f} s[/]", highlight=False)


def compare(
    a: Annotated[Path, typer.Argument(help="A file of answers, or the directory of a finished job: its answers after training.")],
    b: Annotated[Path, typer.Argument(help="The same, to be held against the first.")],
    before: Annotated[bool, typer.Option("--before", help="Of the first, a job directory, take the answers before training.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Compare on the questions that both have, if they differ.")] = False,
    show: Annotated[int, typer.Option("--show", min=0, max=1000, help="Show so many questions that were gained, and lost.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare the answers of two models to the same questions: both accuracies, the paired difference, and what was gained and lost.

    Answers come from finished jobs, or from `edge-agent evaluate --out`.
    """
    with explained(as_json):
        places = [(a, "before.jsonl" if before else "after.jsonl"), (b, "after.jsonl")]
        if before and not a.is_dir():
            raise typer.BadParameter("--before belongs to a job directory")
        files = [path / name if path.is_dir() else path for path, name in places]
        found = answers.compare(files[0], files[1], shared, show)
        if as_json:
            print_json(found)
        else:
            Console().print(comparison_view(found))


def dataset_check(
    file: Annotated[Path, typer.Argument(help="A JSONL file, or a JSON array of records.")],
    model: Annotated[str | None, typer.Option("--model", help="Count tokens as this model does; its weights are not loaded.")] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Look for questions of this evaluation file in the dataset.")
    ] = None,
    verifier: VerifierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a dataset strictly and say what is in it, and which lines are wrong and why."""
    with explained(as_json):
        try:
            options = msgspec.convert({"verifier": named_verifier(verifier or "numeric")}, type=Evaluation)
        except msgspec.ValidationError as error:
            raise JobSchema("--verifier", explain(error, Evaluation)) from None
        found, records = check(file, options.verifier, eval_data)
        if model is not None:
            with imports():
                from edge_agent.training.token_lengths import token_lengths

            found = msgspec.structs.replace(found, tokens=token_lengths(records, model))
        if as_json:
            print_json(found)
        else:
            Console().print(dataset_tables(found))
        if found.error:
            raise typer.Exit(DatasetSchema.exit_code)


def dataset_build(
    model: Annotated[str, typer.Option("--model", help="A model directory, or the id of a model in the local Hugging Face cache.")],
    data: Annotated[Path, typer.Option("--data", help="Dataset, JSONL or a JSON array; its forms: docs/dataset.md.")],
    out: Annotated[Path, typer.Option("--out", help="The JSONL file to write; run again to go on after an interruption.")],
    outputs: Annotated[int | None, typer.Option("--outputs", help="Outputs sampled for each record without one (default 4).")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Temperature of the sampling (default 0.8).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Longest output (default 256).")] = None,
    verifier: VerifierOption = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="worked (default) or plain.")] = None,
    judge: Annotated[str | None, typer.Option("--judge", help="critic (default), model, or endpoint:ALIAS.")] = None,
    per_question: Annotated[
        int | None, typer.Option("--per-question", help="Keep at most this many correct and as many incorrect outputs of a question.")
    ] = None,
    correct_share: Annotated[
        float | None, typer.Option("--correct-share", help="Keep this share of correct outputs (default: all).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of sampling and draw (default 42).")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Prompts generated at once (default 64).")] = None,
    device: DeviceOption = None,
    config: ConfigOption = AGENT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Complete a dataset of questions and standard answers with the model's own outputs, and judge the incorrect ones.

    What is done is kept in a directory beside the file to write: the same command goes on from there.
    """
    with explained(as_json):
        fields = {
            "sampling.outputs": outputs, "sampling.temperature": temperature, "sampling.per_question": per_question,
            "sampling.correct_share": correct_share, "evaluation.verifier": named_verifier(verifier),
            "evaluation.max_new_tokens": max_new_tokens,
            "evaluation.batch": batch, "prompts": prompts, "seed": seed, "device": device,
        }  # fmt: skip
        options = build_options(judge, fields)
        judges = _judges(options.judging, config)
        with imports():
            from edge_agent.training.build import build_dataset

        if as_json:
            print_json(build_dataset(model, data, out, options, lambda event: None, judges))
            return
        console = Console()
        with LiveView(console) as view:
            built = build_dataset(model, data, out, options, view, judges)
        console.print(built_table(built))


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where datasets, adapters, logs and report.json go.")] = Path("build/demo"),
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=20, help="How many seeds to run, one after the other.")] = 1,
    domains: Annotated[list[str] | None, typer.Option("--domain", help="chain (default) or distractor; repeatable.")] = None,
    data_only: Annotated[bool, typer.Option("--data-only", help="Only write the datasets and a copy of the model; run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send the shipped tiny model's node domains that it has not seen, over a real broker, and compare base, SFT and NLFT.

    Starts broker, coordinator and node on loopback and stops them at the end, whatever happens.
    """
    with explained(as_json):
        from edge_agent.demo.tour import DOMAINS, run_demo, write_files

        chosen = list(dict.fromkeys(domains or ["chain"]))
        if unknown := [d for d in chosen if d not in DOMAINS]:
            raise typer.BadParameter(f"there is no domain {unknown[0]!r}; choose of {', '.join(DOMAINS)}")
        if data_only:
            written = write_files(out, seeds, chosen)
            if as_json:
                print_json([str(path) for path in written])
            else:
                typer.echo("\n".join(map(str, written)))
            return
        report = run_demo(out, seeds, chosen, Console(stderr=as_json))
        if as_json:
            print_json(report)
        if not report.holds:
            raise typer.Exit(1)
