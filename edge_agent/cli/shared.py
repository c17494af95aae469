"""What all commands share: options, exit codes, and how an error or a JSON document is printed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from edge_agent.console import printable
from edge_agent.errors import EdgeAgentError, PackageMissing
from profiles import nvidia

EXIT_CODES = """
Exit codes: 0 success, 1 internal error, 2 wrong usage, 3 dataset, 4 job or directory, 5 model or adapter, 6 does not fit the
budget or the free memory, 7 out of memory, 8 disk full, 9 loss not finite, 10 time limit,
11 no such device, 12 stopped on request, 13 configuration or state directory of a daemon, 14 coordinator away or unwilling,
15 endpoint of judgments unknown or unwilling, 16 trained, and the adapter is not accepted,
17 tracking server away or unwilling, 130 interrupted (run again to go on).
"""

EXTRAS = dict.fromkeys(("litestar", "uvicorn", "sqlalchemy", "amqtt"), "coordinator")
EXTRAS |= {name: name for name in ("tensorboard", "mlflow", "gguf")}
"""The extra that a package is of which a node does without."""

ModelOption = Annotated[
    str | None, typer.Option("--model", help="A model directory, or the id of a model in the local Hugging Face cache.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Dataset, JSONL or a JSON array; its forms: docs/dataset.md.")]
EvalDataOption = Annotated[Path | None, typer.Option("--eval-data", help="Dataset of the questions to measure on; default: hold some out.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Memory that the run may take, such as 6GiB.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
ProfileOption = Annotated[
    str | None,
    typer.Option("--device", help="auto (this machine), or the name of a profile (docs/job.md), such as rtx-4090-24gb."),
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Train on this many questions, drawn by the seed.")]
QuestionsOption = Annotated[int | None, typer.Option("--questions", help="Measure on at most this many held-out questions.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any other field of the job, such as schedule.updates=60 or method.cluster=like; repeatable. See docs/job.md."
    ),
]
ConfigOption = Annotated[
    Path, typer.Option("--config", help="The agent's configuration, whose [judges] name the endpoints; see docs/config.md.")
]
VerifierOption = Annotated[
    str | None, typer.Option("--verifier", help="numeric (default), exact, choice, none (free text), or regex:PATTERN in RE2's syntax.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
DirectoryArgument = Annotated[Path | None, typer.Argument(help="A job directory, instead of --model, --data and --out.")]


@contextmanager
def imports() -> Iterator[None]:
    """Import PyTorch and what stands on it, which see the GPU that is measured, and none beside it.

    They come in a fifth less time: what they make stays, and nothing looks through all of it again and again.
    """
    nvidia.see_one()
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.freeze()


@contextmanager
def explained(as_json: bool) -> Iterator[None]:
    """Turn an error into one readable line (or JSON document) and its exit code."""
    try:
        yield
    except EdgeAgentError as error:
        _print_error(error.code, str(error), as_json)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.BadParameter, SystemExit, GeneratorExit):
        raise
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None
    except BaseException as error:  # libraries in Rust panic by one that is no Exception
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            missing = PackageMissing(error.name, EXTRAS[error.name])
            _print_error(missing.code, str(missing), as_json)
            raise typer.Exit(missing.exit_code) from None
        _print_error(EdgeAgentError.code, f"{type(error).__name__}: {error}", as_json)
        Console(stderr=True).print_exception()
        raise typer.Exit(EdgeAgentError.exit_code) from None


def _print_error(code: str, text: str, as_json: bool) -> None:
    if as_json:
        print_json({"error": {"code": code, "text": text}})
    else:
        line = Text.assemble(("error ", "bold red"), (code, "red"), f": {printable(text)}")
        Console(stderr=True).print(line, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")
