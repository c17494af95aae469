"""What a job would take, before it is sent: in closed form, of the longest texts of its dataset, without tokenizer and without torch."""

from __future__ import annotations

from math import ceil

from msgspec.structs import replace

from edge_agent.admission import check_job, read_model
from edge_agent.config import AgentConfig
from edge_agent.job import CutOptions, Job, NlftOptions, ReftOptions
from edge_agent.messages import Texts
from edge_agent.prompts import PROMPTS, Prompts
from profiles.calibration import calibrated
from profiles.device import DeviceProfile
from quantization.estimate import Lengths, make_estimate
from quantization.ladder import Rows
from quantization.plan import Plan

CHARACTERS_A_TOKEN = 3
"""Of English and of numbers 3 to 4; of other scripts fewer, which then take more than is forecast."""
TEMPLATE_TOKENS = 16
"""That a chat template adds to a prompt."""
MOST_ROWS = 1024
"""Of a micro-batch; no device that this is for takes more."""
JUDGMENT_TOKENS = 128
"""Of a judgment that is still to be written."""


def forecast(job: Job, texts: Texts, config: AgentConfig, device: DeviceProfile) -> tuple[Plan, str | None]:
    """Return the plan of a job on a node, about, and what else there is to say.

    Raises Rejected, ModelUnsupported, and DoesNotFit with the smallest budget that would do.
    """
    check_job(job, config, device)
    files, shape = read_model(job.model, config)
    job = replace(job, schedule=replace(job.schedule, batch=min(job.schedule.batch, MOST_ROWS)))
    lengths, longest = lengths_of(job, texts, files.context_tokens)
    plan = make_estimate(shape, job, lengths, calibrated(device))
    if longest <= files.context_tokens:
        return plan, None
    return plan, (
        f"its longest texts take about {longest:,} tokens together, the model's context has {files.context_tokens:,}: "
        "where one record has them, the job is refused"
    )


def lengths_of(job: Job, texts: Texts, context_tokens: int) -> tuple[Lengths, int]:
    """Return the lengths of a job as if every record had the longest text of each kind, cut off at the model's context.

    With them the tokens of those texts together, in the longest context.
    """
    prompts = job.prompts if isinstance(job.prompts, Prompts) else PROMPTS[job.prompts]
    method, new, batch = job.method, job.evaluation.max_new_tokens, job.schedule.batch
    scored, during = isinstance(method, NlftOptions | CutOptions), isinstance(method, ReftOptions)
    samples = during or (scored and job.sampling.outputs > 0 and not texts.output)

    def text(characters: int) -> str | None:
        return "x" * min(characters, CHARACTERS_A_TOKEN * context_tokens) or None

    def prompt(answer: int = 0, judgment: int = 0) -> int:
        messages = prompts.messages(text(texts.question) or "", answer=text(answer), judgment=text(judgment))
        return TEMPLATE_TOKENS + sum(_tokens(len(message["content"])) for message in messages)

    base = prompt()
    judgment = texts.judgment or JUDGMENT_TOKENS * CHARACTERS_A_TOKEN
    longest = max(base, prompt(texts.answer), prompt(judgment=judgment)) if scored else base
    own = max(texts.answer, texts.output)
    given = base + _tokens(max(0, texts.question - CHARACTERS_A_TOKEN * context_tokens)) + _tokens(own)
    given += _tokens(max(texts.answer, texts.judgment)) if scored else 0
    answer = 1 + max(_tokens(texts.answer), _tokens(texts.output), new if samples else 0)
    shared = min(base, _tokens(len(prompts.instruction)))
    samples_of_all = min(texts.records, job.dataset.limit or texts.records) * (1 + (job.sampling.outputs if samples else 0))

    def rows(of_prompt: int, most: int) -> Rows:
        tokens, count = min(context_tokens, of_prompt + answer), min(most, 3 * samples_of_all, MOST_ROWS)
        return Rows(tokens=(tokens,) * count, answers=(min(answer, tokens),) * count, shared=shared)

    def within(of_prompt: int, tokens: int) -> tuple[int, int]:
        return min(of_prompt, context_tokens - 1), min(tokens, max(0, context_tokens - of_prompt))

    score = rows(longest, 2 * batch)
    repairs = isinstance(method, NlftOptions) and method.repair
    lengths = Lengths(
        train=rows(longest if isinstance(method, CutOptions) else base, batch),
        score=score,
        generate=within(base, new if samples or job.evaluation.questions else 0),
        repair=within(score.longest, new) if repairs else (0, 0),
        judge=within(longest + answer, JUDGMENT_TOKENS) if scored and job.judging.source == "model" else (0, 0),
        asked=shared,
        held=samples_of_all * (3 if scored else 1) * score.longest // 2,
        text_bytes=texts.records * (texts.question + texts.answer + texts.output + texts.judgment),
    )
    return lengths, given


def _tokens(characters: int) -> int:
    return ceil(characters / CHARACTERS_A_TOKEN)
