"""`edge-agent merge`: adapters of one base model, trained on different nodes, as one; measured beside the base model and each of them.

PEFT combines them (`add_weighted_adapter`). What is to be averaged is the change of a weight, B A, and not A and B: (A1 + A2) (B1 + B2)
has products of the one's A with the other's B. `cat` is the exact average, with the ranks added up; `svd` and the methods that end in it
combine the changes themselves and take the best approximation of a rank; the others work on A and B apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from edge_agent.adapters.output import made
from edge_agent.adapters.report import MERGE_REPORT, Held, Merge, Method, Part
from edge_agent.adapters.source import WEIGHTS, Source, base_model, check_base
from edge_agent.answers import Answer, accuracy, check_answers, free_text, measure
from edge_agent.dataset import Record
from edge_agent.errors import AdapterMismatch, JobSchema
from edge_agent.files import write_file
from edge_agent.hints import explain
from edge_agent.job import Evaluation
from edge_agent.prompts import PROMPTS, Prompts
from edge_agent.report import Adapter, Model
from edge_agent.splitting import measurable
from edge_agent.training.evaluate import evaluate
from edge_agent.training.prepare import usable_profile
from edge_agent.training.reporter import memory_explained
from profiles.memory import fix_malloc
from quantization.adapter import adapter_state, add_adapter, load_adapter, save_adapter
from quantization.cache import find_cache
from quantization.load import load_model, load_tokenizer
from quantization.model_files import ModelFiles

MERGED = "merged"
APART = ("linear", "ties", "dare_linear", "dare_ties")
"""Methods that work on A and B apart, and so need one rank."""
DENSE = ("cat", "svd", "linear")
"""Methods that drop nothing."""
Progress = Callable[[str, int, int], None]
"""Hears (what is measured, questions done, all)."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to merge."""

    method: Method = "cat"
    weights: tuple[float, ...] = ()
    """One for each adapter, in any scale; none: the numbers of questions that they were trained on, or all alike where a report lacks."""
    density: float = 0.5
    rank: int | None = None
    """Of a method that ends in svd; None: the largest of the parts."""
    seed: int = 42
    device: str = "auto"


class Questions(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure on."""

    records: list[Record]
    evaluation: Evaluation
    prompts: Prompts


def merge(
    sources: Sequence[Source], model: str | None, out: Path, options: Options, questions: Questions | None, progress: Progress
) -> Merge:
    """Merge adapters into `out/adapter`, measure the result where there are questions, and write `out/merge.json` with the answers.

    Raises AdapterMismatch where they cannot be merged, JobSchema for options that do not go with them, DirectoryUnusable.
    """
    began = time.monotonic()
    files = check(sources, model, options)
    shares = _shares(sources, options.weights)
    fix_malloc()
    with made(out) as part, memory_explained(lambda: "evaluate"):
        tokenizer = load_tokenizer(files)
        merged = load_parts(files, sources, options.device)
        combine(merged, shares, options)
        sha256 = save_adapter(merged, part / "adapter", files.name, MERGED)
        answers = _measured(merged, tokenizer, files, questions, len(sources), progress) if questions else {}
        for name, rows in answers.items():
            write_file(part / f"{name}.jsonl", msgspec.json.Encoder().encode_lines(rows))
        own, size_bytes = answers.get(MERGED, []), (part / "adapter" / WEIGHTS).stat().st_size
        names = ("base", *(source.name for source in sources))
        report = Merge(
            model=Model(files.name, files.fingerprint, files.context_tokens), method=options.method,
            density=None if options.method in DENSE else options.density, seed=options.seed, rank=merged.peft_config[MERGED].r,
            parts=[
                Part(name=s.name, sha256=s.sha256, questions=s.questions, weight=share, fingerprint_known=s.fingerprint is not None)
                for s, share in zip(sources, shares, strict=True)
            ],
            adapter=Adapter(sha256, size_bytes, sum(tensor.numel() for tensor in adapter_state(merged, MERGED).values())),
            held_out=len(own), accuracy=accuracy(own), text=free_text(own),
            against=[
                Held(name=name, accuracy=accuracy(rows), text=free_text(rows), merged=measure(rows, own))
                for name, rows in zip(names, answers.values(), strict=False)
            ],
            seconds=time.monotonic() - began,
        )  # fmt: skip
        write_file(part / MERGE_REPORT, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return report


def check(sources: Sequence[Source], model: str | None, options: Options) -> ModelFiles:
    """Return the base model of adapters that can be merged. Raises AdapterMismatch, JobSchema."""
    _check_options(sources, options)
    first = sources[0]
    if rooted := next((source for source in sources if source.lora.use_rslora), None):
        raise AdapterMismatch(rooted.place, "it is scaled by the root of its rank (rsLoRA), which PEFT merges wrongly; train it without")
    for other in sources[1:]:
        if None not in (first.fingerprint, other.fingerprint) and first.fingerprint != other.fingerprint:
            raise AdapterMismatch(other.place, f"its base model is another one than that of {first.place}")
        if other.matrices.keys() != first.matrices.keys():
            raise AdapterMismatch(other.place, f"it changes other matrices than {first.place}; merge adapters with the same lora.targets")
        if options.method in APART and other.ranks != first.ranks:
            said = f"it has rank {other.lora.r}, {first.place} has {first.lora.r}"
            raise AdapterMismatch(other.place, f"{said}; only cat and the methods that end in svd merge these")
    files = base_model(first, model)
    for other in sources[1:]:
        check_base(other, files)
    return files


def _check_options(sources: Sequence[Source], options: Options) -> None:
    """Raise JobSchema for options that do not go with the adapters."""
    if len(sources) < 2:
        raise JobSchema("merge", "give two adapters or more")
    if options.weights and (len(options.weights) != len(sources) or min(options.weights) <= 0):
        raise JobSchema("--weights", f"give {len(sources)} numbers above 0, one for each adapter")
    if not 0 < options.density < 1:
        raise JobSchema("--density", "it is a share above 0 and below 1")
    if options.rank is not None and not options.method.endswith("svd"):
        raise JobSchema("--rank", "only a method that ends in svd has a rank to choose")
    sides = [side for source in sources for (_, inputs), (outputs, _) in source.matrices.values() for side in (inputs, outputs)]
    rank = options.rank or max(source.lora.r for source in sources)
    if options.method.endswith("svd") and rank > min(sides):
        raise JobSchema("--rank", f"the smallest matrix has {min(sides)} rows or columns, so no more singular values: give at most that")


def load_parts(files: ModelFiles, sources: Sequence[Source], device: str) -> Any:
    """Return the base model in 4 bits with the adapters, which are called `part-1` and so on."""
    vocabulary = next((source.vocabulary for source in sources if source.vocabulary), {})
    loaded = load_model(files, usable_profile(device), cache=find_cache(), **vocabulary)
    adapted = load_adapter(loaded, sources[0].adapter, "part-1")
    for number, source in enumerate(sources[1:], start=2):
        add_adapter(adapted, source.adapter, f"part-{number}")
    return adapted


def combine(adapted: Any, shares: Sequence[float], options: Options, name: str = MERGED) -> None:
    """Put the merge of a model's parts in beside them, and have the model compute with it."""
    ranked = {"svd_rank": options.rank, "svd_full_matrices": False} if options.method.endswith("svd") else {}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(options.seed)
        adapted.base_model.add_weighted_adapter(
            [f"part-{n}" for n in range(1, len(shares) + 1)], weights_of(shares, options.method), name, options.method,
            density=None if options.method in DENSE else options.density, **ranked,
        )  # fmt: skip
    adapted.set_adapter(name)
    adapted.eval()


def weights_of(shares: Sequence[float], method: Method) -> list[float]:
    """Return the weights that make an average of shares, which are 1 together: what all parts agree on stays as it is.

    TIES divides by the number of parts that agree. Where A and B are combined apart, PEFT multiplies each by the root of a weight.
    """
    factors = [share * len(shares) for share in shares] if "ties" in method else list(shares)
    return [factor**2 for factor in factors] if method in APART else factors


def questions_of(sources: Iterable[Source], records: list[Record], given: dict[str, Any], prompts: str | None) -> Questions:
    """Return what to measure on, with the options of the adapters' jobs where these agree and nothing else is given. Raises JobSchema."""
    jobs = [source.job for source in sources if source.job]
    fields: dict[str, Any] = {"questions": len(records)}
    for name in ("verifier", "max_new_tokens", "batch"):
        values = {msgspec.json.encode(getattr(job.evaluation, name)) for job in jobs}
        if len(values) == 1:
            fields[name] = msgspec.json.decode(values.pop())
    try:
        evaluation = msgspec.convert(fields | {name: value for name, value in given.items() if value is not None}, type=Evaluation)
    except msgspec.ValidationError as error:
        raise JobSchema("options", explain(error, Evaluation)) from None
    sets = {msgspec.json.encode(job.prompts): job.prompts for job in jobs}
    chosen = prompts or (sets.popitem()[1] if len(sets) == 1 else "worked")
    if isinstance(chosen, str) and chosen not in PROMPTS:
        raise JobSchema("--prompts", f"there is no set {chosen!r}; choose of {', '.join(PROMPTS)}")
    held_out = measurable(records)[: evaluation.questions]
    check_answers("evaluation questions", [(r.id, r.reference) for r in held_out], evaluation.verifier)
    return Questions(records=held_out, evaluation=evaluation, prompts=PROMPTS[chosen] if isinstance(chosen, str) else chosen)


def _shares(sources: Sequence[Source], weights: Sequence[float]) -> list[float]:
    """Return the weights of the adapters, 1 together: as given, else by questions (McMahan et al. 2017, FedAvg), else all alike."""
    counts = [source.questions for source in sources]
    raw = list(weights) or ([float(n) for n in counts if n] if all(counts) else [1.0] * len(sources))
    return [weight / sum(raw) for weight in raw]


def _measured(
    merged: Any, tokenizer: Any, files: ModelFiles, questions: Questions, parts: int, progress: Progress
) -> dict[str, list[Answer]]:
    """Return the answers of the base model, of every part, and of the merged adapter to the same questions."""

    def answers(name: str) -> list[Answer]:
        return evaluate(
            merged, tokenizer, questions.records, questions.prompts, questions.evaluation, batch=questions.evaluation.batch,
            context_tokens=files.context_tokens, progress=lambda done, total, _: progress(name, done, total),
        )  # fmt: skip

    with merged.disable_adapter():
        found = {"base": answers("base")}
    for name in (*(f"part-{n}" for n in range(1, parts + 1)), MERGED):
        merged.set_adapter(name)
        found[name] = answers(name)
    return found
