"""Judgments that a language model writes: what of its text is kept, and the endpoint that is asked for them.

An endpoint speaks the chat completions protocol of OpenAI; its client retries, with pauses that grow or that the server names. What a
batch of requests may cost at most is on disk before they go out, and settled when their answers are there: a run that is killed in
between counts the most, and no job passes its spending cap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edge_agent.config import Endpoint
from edge_agent.errors import JudgeRefused
from edge_agent.journal import Journal

Messages = list[dict[str, str]]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]

JUDGMENT_CHARACTERS = 1000
RETRIES = 3
GIVE_UP_AFTER = 5
"""Requests in a row without a usable answer; the rest is not asked for."""
TEMPLATE_TOKENS = 64
"""What a server may put around the messages of a request."""
MISCONFIGURED = frozenset({*range(300, 400), 401, 403, 404, 405})
"""Statuses that no other record would change: key, rights, model or address are wrong. No redirect is followed."""
BEAT_S = 1.0


def clean_judgment(text: str) -> str | None:
    """Return the text without line breaks and without what could steer a terminal, cut to `JUDGMENT_CHARACTERS`; None for nothing."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 16 * JUDGMENT_CHARACTERS])
    return " ".join(printable.split())[:JUDGMENT_CHARACTERS].strip() or None


class Asked(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of `judgments.jsonl`: what a batch may cost at most, or its answers and what they cost less than that."""

    texts: list[str | None] = []
    """Judgments in the order of the records; None where there was no usable answer."""
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0
    stopped: str | None = None
    """Why nothing more was asked."""


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Usage(msgspec.Struct):
    prompt_tokens: Count
    completion_tokens: Count


class _Completion(msgspec.Struct):
    """What is read of a chat completion."""

    choices: list[_Choice] = []
    usage: _Usage | None = None


@dataclass(frozen=True)
class _Reply:
    text: str | None = None
    usage: _Usage | None = None
    status: int | None = None
    """Of a refusal."""


@dataclass
class _Traffic:
    """Requests that went out, and those that were answered with an error or a redirect, which costs nothing."""

    sent: int = 0
    refused: int = 0

    async def on_request(self, _: object) -> None:
        self.sent += 1

    async def on_response(self, response: Any) -> None:
        self.refused += response.status_code >= 300


class EndpointJudge:
    """Asks an endpoint for judgments; `file` keeps what came and what it cost over restarts. `beat` is called while it waits."""

    def __init__(self, alias: str, endpoint: Endpoint, file: Path, beat: Callable[[int, int, int], None]) -> None:
        self._alias, self._endpoint, self._beat = alias, endpoint, beat
        self._key = endpoint.key or "none"  # before anything is set aside for a request that could not go out
        self._journal = Journal(file, Asked)
        self.resumed = bool(self._journal.rows)

    @property
    def rows(self) -> list[Asked]:
        """All that was asked, in this run and in earlier ones."""
        return self._journal.rows

    def judge(self, wanted: Sequence[Messages]) -> list[str | None]:
        """Return a judgment for each request, None where there is none: past the cap, or after too many without a usable answer.

        Raises JudgeRefused where the endpoint takes no request at all.
        """
        texts = [text for row in self.rows for text in row.texts]
        spent = sum(row.spent for row in self.rows)
        while len(texts) < len(wanted):
            group, most = self._affordable(wanted[len(texts) : len(texts) + self._endpoint.parallel], spent)
            if texts[-GIVE_UP_AFTER:] == [None] * GIVE_UP_AFTER:
                row = self._give_up(f"{GIVE_UP_AFTER} requests in a row had no usable answer", len(wanted) - len(texts))
            elif not group:
                row = self._give_up("the spending cap is reached", len(wanted) - len(texts))
            else:
                self._journal.append(Asked(spent=most))
                row = self._ask(group, most, len(texts), len(wanted))
                spent += most
            spent += row.spent
            texts += row.texts
            self._beat(len(texts), len(wanted), row.output_tokens)
        return texts

    def _give_up(self, why: str, rest: int) -> Asked:
        row = Asked([None] * rest, stopped=why)
        self._journal.append(row)
        return row

    def _affordable(self, wanted: Sequence[Messages], spent: float) -> tuple[list[Messages], float]:
        """Return as many requests as may be tried with all their repetitions under the cap, and what they may cost at most."""
        group: list[Messages] = []
        most = 0.0
        for messages in wanted:
            more = (1 + RETRIES) * self._most(messages)
            if spent + most + more > self._endpoint.spending_cap:
                break
            group.append(messages)
            most += more
        return group, most

    def _most(self, messages: Messages) -> float:
        """What a request may cost at most: no tokenizer makes more tokens than there are bytes."""
        size = sum(len(m["content"].encode()) for m in messages)
        return self._price(_Usage(size + TEMPLATE_TOKENS, self._endpoint.max_tokens))

    def _price(self, usage: _Usage) -> float:
        return (usage.prompt_tokens * self._endpoint.input_price + usage.completion_tokens * self._endpoint.output_price) / 1e6

    def _ask(self, group: list[Messages], most: float, done: int, total: int) -> Asked:
        """Ask for a batch and settle what was set aside for it."""
        traffic = _Traffic()
        replies = asyncio.run(self._ask_all(group, traffic, lambda: self._beat(done, total, 0)))
        used = [r.usage for r in replies if r.usage is not None]
        unknown = traffic.sent - traffic.refused - len(used)  # never answered, or without a count: the server may have worked
        spent = sum(map(self._price, used)) + unknown * max(map(self._most, group))
        refused = next((r.status for r in replies if r.status in MISCONFIGURED), None)
        row = Asked(
            [] if refused else [r.text for r in replies], traffic.sent, sum(u.prompt_tokens for u in used),
            sum(u.completion_tokens for u in used), spent - most,
        )  # fmt: skip
        self._journal.append(row)
        if refused:
            raise JudgeRefused(self._alias, refused)
        return row

    async def _ask_all(self, group: list[Messages], traffic: _Traffic, beat: Callable[[], None]) -> list[_Reply]:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        hooks: dict[str, list[Callable[..., Any]]] = {"request": [traffic.on_request], "response": [traffic.on_response]}
        async with AsyncOpenAI(
            base_url=self._endpoint.url, api_key=self._key, timeout=self._endpoint.timeout_s, max_retries=RETRIES,
            http_client=DefaultAsyncHttpxClient(event_hooks=hooks, follow_redirects=False),
        ) as client:  # fmt: skip
            tasks = [asyncio.create_task(self._ask_one(client, messages)) for messages in group]
            try:
                while (await asyncio.wait(tasks, timeout=BEAT_S))[1]:
                    beat()
            finally:
                for task in tasks:
                    task.cancel()
            return [task.result() for task in tasks]

    async def _ask_one(self, client: Any, messages: Messages) -> _Reply:
        from openai import OpenAIError

        limit = self._endpoint.max_tokens
        options = {"max_completion_tokens": limit} if self._endpoint.reasoning else {"max_tokens": limit, "temperature": 0}
        try:
            answer = await client.chat.completions.with_raw_response.create(model=self._endpoint.model, messages=messages, **options)
            completion = msgspec.json.decode(answer.content, type=_Completion)
        except OpenAIError as error:  # what a server says of a refusal may hold parts of the key: only its status is kept
            return _Reply(status=getattr(error, "status_code", None))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _Reply()
        said = completion.choices[0].message.content if completion.choices else None
        return _Reply(clean_judgment(said or ""), completion.usage)
