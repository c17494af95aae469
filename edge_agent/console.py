"""What a person sees: the live view while a job runs, and the summary after it."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from edge_agent.answers import Comparison
from edge_agent.coordinator.rollout import Choice, RolloutView
from edge_agent.coordinator.views import Audited, DatasetView, JobView, NodeView, RolloutNode, Token
from edge_agent.doctor import Check
from edge_agent.errors import human_bytes
from edge_agent.messages import JobProgress, OptionsState
from edge_agent.report import Accuracy, Built, Energy, Event, Example, FreeText, Judgments, Measured, PassAtK, Result
from profiles.recorder import StageRow
from profiles.sensors import Resources
from quantization.plan import Survey

V = TypeVar("V", bound="LiveView")


class LiveView:
    """Shows the running stage, loss, tokens/s and memory against the budget, and a line for every finished stage.

    On a terminal it redraws in place; elsewhere it prints one line a stage.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True, refresh_per_second=4)

    def __enter__(self: V) -> V:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.event == "stage_finished":
            self._line(event.stage or "", event.seconds or 0.0, event.memory_bytes or 0)
        elif event.event in ("stage_started", "progress"):
            self.show(event, [])
        elif event.event == "out_of_memory":
            self._console.print(f"[yellow]↓[/] {event.stage}: {escape(event.text or '')}; going on with smaller settings", highlight=False)
        elif event.event == "paused":
            self._console.print(f"[yellow]‖[/] {event.stage}: others need the memory; going on when there is room", highlight=False)

    def _line(self, stage: str, seconds: float, peak_bytes: int) -> None:
        self._console.print(
            f"[green]✓[/] {escape(f'{stage:<9}')}[dim]{seconds:8.1f} s   peak {human_bytes(peak_bytes)}[/]", highlight=False
        )

    def show(self, event: Event, more: list[str]) -> None:
        """Redraw the running stage, with more facts after its own."""
        self._live.update(self._row(event, more))

    @staticmethod
    def _row(event: Event, more: list[str]) -> Table:
        row = Table.grid(padding=(0, 2))
        facts = [f"{event.done or 0:,}/{event.total or 0:,}"] if event.total else []
        if event.loss is not None:
            facts.append(f"loss {event.loss:.4f}")
        if event.tokens_per_s:
            facts.append(f"{event.tokens_per_s:,.0f} tokens/s")
        if event.memory_bytes and event.budget_bytes:
            facts.append(f"{human_bytes(event.memory_bytes)} of {human_bytes(event.budget_bytes)}")
        bar = ProgressBar(total=event.total or 1, completed=event.done or 0, width=30, pulse=event.total is None)
        row.add_row(Text(f"  {event.stage}", style="bold"), bar, "  ".join(facts + more))
        return row


class FleetView(LiveView):
    """The same for a job on a node: its state at every change, and the node's resources beside its progress."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._finished = 0
        self._attempt = 0
        self._state = ""

    def tell(self, item: JobView | JobProgress) -> None:
        """Show a change of the job, or its progress."""
        if isinstance(item, JobView):
            self._tell_state(item)
            return
        if len(item.finished) < self._finished:  # the trainer was started again
            self._finished = 0
        for stage in item.finished[self._finished :]:
            self._line(" ".join(_shorten(stage.stage, 40).split()), stage.seconds, stage.peak_bytes)
        self._finished = len(item.finished)
        self.show(item.event, format_resources(item.resources))

    def _tell_state(self, job: JobView) -> None:
        state = f"{job.outcome or job.phase}" + (f", attempt {job.attempt}" if job.attempt > 1 else "")
        if state != self._state:
            self._state = state
            self._console.print(f"[bold]{job.id}[/] on {job.node}: {state}", highlight=False)


def format_resources(resources: Resources) -> list[str]:
    """Return what sensors have a value for; the rest is in `edge-agent nodes --json` with its reason."""
    units = ((resources.utilisation_percent, "{:.0f} % busy"), (resources.temperature_c, "{:.0f} °C"), (resources.power_w, "{:.1f} W"))
    shown = [text.format(reading.value) for reading, text in units if reading.value is not None]
    if resources.device_free_bytes.value is not None:
        shown.append(f"{human_bytes(resources.device_free_bytes.value)} free")
    return shown


def summary(result: Result, directory: Path | None) -> Group:
    """Return the summary of a finished job; `directory` is where its files are, None where they are on a node."""
    parts: list[object] = []
    if result.accuracy:
        parts.append(_measured(result.accuracy, _acceptance(result.accepted, result.acceptance)))
    parts.append(_stages(result.stages, result.budget_bytes))
    parts.append(Text(f"energy: {printable(format_energy(result.energy))}"))
    if result.data and result.data.judgments != Judgments():
        parts.append(Text(printable(f"judgments of incorrect outputs: {format_judgments(result.data.judgments)}")))
    if result.examples:
        parts.append(_examples(result.examples))
    if directory is not None:
        parts.append(_places(result, directory))
    return Group(*parts)  # type: ignore[arg-type]


def built_table(built: Built) -> Table:
    """Return the summary of a dataset that was built."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("dataset", Text(f"{printable(built.file)}  (sha256 {built.sha256[:12]}…)"))
    grid.add_row("questions", f"{built.questions:,}, {built.records:,} records")
    grid.add_row("outputs", f"{built.outputs:,} sampled, {built.cut_off:,} cut off; {built.distinct:,} distinct ones, given ones included")
    grid.add_row("kept", f"{built.correct:,} correct, {built.incorrect:,} incorrect")
    grid.add_row("judged", format_judgments(built.judgments))
    grid.add_row("took", f"{built.tokens:,} tokens in {built.seconds:.1f} s" + (", after an earlier run" if built.resumed else ""))
    for problem in built.problems:
        grid.add_row("[yellow]note[/]", Text(printable(problem)))
    return grid


def format_judgments(judgments: Judgments) -> str:
    """`12 by the endpoint, 3 by the critic; 12 requests, 0.0042 spent`."""
    j = judgments
    by = {"given": j.given, "by the endpoint": j.endpoint, "by the model": j.model, "by the critic": j.critic}
    text = ", ".join(f"{count:,} {who}" for who, count in by.items() if count) or "none"
    return text + (f"; {j.requests:,} requests, {j.spent:.4g} spent" if j.requests else "") + (f"; {j.stopped}" if j.stopped else "")


def format_energy(energy: Energy) -> str:
    """`1,234 J, 24.7 J a record (nvml_counter)`, or why it is not known."""
    if energy.total_j is None:
        return f"not measured: {energy.reason}"
    each = energy.reason if energy.per_record_j is None else f"{energy.per_record_j:,.1f} J a record"
    return f"{energy.total_j:,.0f} J, {each} ({energy.source})"


def format_accuracy(a: Accuracy | None) -> str:
    """`84.3 % [79.8, 88.0], 300 questions`."""
    return "-" if a is None else f"{_share(a.value, a.low, a.high)}, {a.n} questions"


def format_text(t: FreeText) -> str:
    """`-1.2345 nats a token [-1.3000, -1.1000], chrF 41.2, 100 records`."""
    return f"{t.logp:.4f} nats a token [{t.low:.4f}, {t.high:.4f}], chrF {t.chrf:.1f}, {t.n} records"


def _share(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _measured(measured: Measured, acceptance: str | None = None, names: tuple[str, str] = ("before", "after")) -> Panel:
    grid = Table.grid(padding=(0, 2))
    title = "Accuracy on held-out questions (95 % intervals)"
    if measured.paired is not None:
        pair = measured.paired
        grid.add_row(names[0], format_accuracy(measured.before))
        grid.add_row(names[1], Text(format_accuracy(measured.after), style="bold"))
        after = {p.k: p for p in measured.pass_after}
        for first in measured.pass_before:
            if second := after.get(first.k):
                grid.add_row(f"pass@{first.k}", " → ".join(_share(p.value, p.low, p.high) for p in (first, second)))
        p_value = "p < 0.001" if pair.p_value < 0.001 else f"p = {pair.p_value:.3f}"
        points = f"{100 * pair.difference:+.1f} points [{100 * pair.low:+.1f}, {100 * pair.high:+.1f}]"
        grid.add_row("paired", f"{points}; {pair.gained} gained, {pair.lost} lost, {p_value} (exact)")
    elif measured.text_before is not None and measured.text_after is not None and measured.text_difference is not None:
        title, paired = "Held-out free text (95 % intervals)", measured.text_difference
        grid.add_row(names[0], format_text(measured.text_before))
        grid.add_row(names[1], Text(format_text(measured.text_after), style="bold"))
        grid.add_row("paired", f"{paired.value:+.4f} nats a token [{paired.low:+.4f}, {paired.high:+.4f}]")
    else:
        return Panel(Text(f"not measured: {printable(measured.reason or '')}"), title=title, title_align="left")
    if measured.cut_off_before or measured.cut_off_after:
        counts = f"{measured.cut_off_before:,} outputs {names[0]}, {measured.cut_off_after:,} {names[1]}"
        grid.add_row("cut off", f"{counts}, at evaluation.max_new_tokens")
    if acceptance:
        grid.add_row("adapter", acceptance)
    return Panel(grid, title=title, title_align="left")


def _acceptance(accepted: bool | None, why: str | None) -> str | None:
    return None if accepted is None else f"{'accepted' if accepted else '[bold red]not accepted[/]'}: {escape(printable(why or ''))}"


def measurement_table(accuracy: Accuracy | None, passes: list[PassAtK], text: FreeText | None, cut_off: int) -> Table:
    """Return what `edge-agent evaluate` measured, a line each."""
    grid = Table.grid(padding=(0, 2))
    if text is not None:
        grid.add_row("free text", format_text(text))
    else:
        grid.add_row("accuracy", format_accuracy(accuracy))
    for row in passes:
        grid.add_row(f"pass@{row.k}", _share(row.value, row.low, row.high))
    if cut_off:
        grid.add_row("cut off", f"{cut_off:,} outputs; give more room with --max-new-tokens")
    return grid


def comparison_view(found: Comparison) -> Group:
    """Return what `edge-agent compare` found."""
    parts: list[object] = [_measured(found.measured, names=("first", "second"))]
    if found.only_a or found.only_b:
        parts.append(
            Text(f"{found.shared:,} shared questions; {found.only_a:,} are only in the first, {found.only_b:,} only in the second")
        )
    for name, rows in (("Gained", found.gained), ("Lost", found.lost)):
        if rows:
            parts.append(_examples(rows, name))
    return Group(*parts)  # type: ignore[arg-type]


def _stages(rows: list[StageRow], budget_bytes: int) -> Table:
    table = Table(title=f"Stages (budget {human_bytes(budget_bytes)})", title_justify="left", title_style="bold")
    for name in ("stage", "seconds", "tokens", "tokens/s", "peak", "planned"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        rate = f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "-"
        planned = human_bytes(row.planned_bytes) if row.planned_bytes else "-"
        name = f"{row.stage} (resumed)" if row.resumed else row.stage
        over = " [red]over budget[/]" if row.peak_bytes > budget_bytes else ""
        table.add_row(
            name, f"{row.seconds:.1f}", f"{row.tokens:,}" if row.tokens else "-", rate, human_bytes(row.peak_bytes) + over, planned
        )
    return table


def _examples(examples: list[Example], title: str = "Answers before and after") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    for name in ("question", "standard answer", "before", "after"):
        table.add_column(name, overflow="fold")
    for e in examples:
        cells = [_verdict(e.before, e.correct_before), _verdict(e.after, e.correct_after)]
        table.add_row(Text(_shorten(e.question)), Text(_shorten(e.answer)), *cells)
    return table


def _verdict(text: str, correct: bool | None) -> Text:
    if correct is None:
        return Text(_shorten(text))
    return Text(f"{_shorten(text)}\n{'✓' if correct else '✗'}", style="green" if correct else "red")


def _shorten(text: str, limit: int = 300) -> str:
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """Return text from outside without what could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _places(result: Result, directory: Path) -> Table:
    grid = Table.grid(padding=(0, 2))
    if result.adapter:
        grid.add_row(
            "adapter", Text(f"{directory / 'adapter'}  (sha256 {result.adapter.sha256[:12]}…, {human_bytes(result.adapter.size_bytes)})")
        )
    grid.add_row("report", Text(str(directory / "result.json")))
    if (directory / "saliency.json").exists():
        grid.add_row("saliency", Text(f"edge-agent saliency {directory}"))
    if (directory / "trace.json").exists():
        grid.add_row("trace", Text(str(directory / "trace.json")))
    return grid


def nodes_table(nodes: list[NodeView]) -> Table:
    """Return a row for each node."""
    columns = ("state", "device", "budget", "models", "labels", "works on", "now", "seen")
    table = Table(Column("node", no_wrap=True), *columns, box=None, padding=(0, 2))
    for node in nodes:
        info, beat = node.info, node.heartbeat
        waiting = f", {beat.queue} wait" if beat and beat.queue else ""
        table.add_row(
            node.id, Text(node.state, style="green" if node.present else "red"), Text(_shorten(info.device) if info else "-"),
            human_bytes(info.limits.budget_bytes) if info else "-", Text(printable(", ".join(info.models)) if info else "-"),
            Text(_shorten(", ".join(f"{name}={text}" for name, text in info.labels.items())) if info and info.labels else "-"),
            ((beat.job if beat else None) or "-") + waiting, ", ".join(format_resources(beat.resources)) if beat else "-", _age(node.seen),
        )  # fmt: skip
    return table


def jobs_table(jobs: list[JobView]) -> Table:
    """Return a row for each job."""
    table = Table(
        Column("job", no_wrap=True), "node", "run", "state", Column("accuracy", no_wrap=True), Column("age", no_wrap=True), box=None,
        padding=(0, 1),
    )  # fmt: skip
    for job in jobs:
        good = job.outcome in (None, "succeeded")
        measured = job.result.accuracy if job.result else None
        both = (measured.before, measured.after) if measured else (None, None)
        accuracy = " → ".join(f"{100 * a.value:.1f}" for a in both if a)
        run = f"{printable(job.order.job.model)} {job.order.job.method.__struct_config__.tag}"
        state = Text(job.outcome or job.phase, style="" if good else "red")
        if job.lost:
            state.append(" lost", style="red")
        if job.reason not in (None, job.outcome):
            state.append(f" {job.reason}")
        if job.result is not None and job.result.accepted is False:
            state.append(" not accepted", style="red")
        table.add_row(job.id, job.node, Text(run), state, f"{accuracy} %" if accuracy else "-", _age(job.created))
    return table


def options_line(job: JobView) -> str:
    """`options 3 sent; 2 taken after update 40`, and why where the newest are refused."""
    sent, state = job.options.number if job.options else 0, job.options_state or OptionsState()
    if not max(sent, state.number):
        return "no options were sent; it has those of its document"
    taken = f"{state.taken} taken after update {state.update or 0:,}" if state.taken else "none taken yet"
    text = f"options {sent} sent; {taken}"
    return text + (f"; {state.number} refused: {printable(state.refused)}" if state.refused else "")


def rollouts_table(rollouts: list[RolloutView]) -> Table:
    """Return a row for each rollout."""
    table = Table(Column("rollout", no_wrap=True), "model", "state", "nodes", "age", box=None, padding=(0, 2))
    for rollout in rollouts:
        state = Text(rollout.state, style="red" if rollout.state == "aborted" else "")
        table.add_row(rollout.id, Text(printable(rollout.plan.job.model)), state, _format_counts(rollout), _age(rollout.created))
    return table


def rollout_view(rollout: RolloutView, nodes: list[RolloutNode]) -> Group:
    """Return a rollout, and a row for each of some of its nodes."""
    facts = Table.grid(padding=(0, 2))
    text = f": {printable(rollout.text)}" if rollout.text else ""
    facts.add_row("state", Text(f"{rollout.state}{text}"))
    facts.add_row("nodes", f"{_format_counts(rollout)}; chosen when it was made, {_age(rollout.created)} ago")
    if rollout.next is not None:
        facts.add_row("next job", f"in {max(0.0, rollout.next - time.time()):.0f} s")
    table = Table(Column("node", no_wrap=True), Column("job", no_wrap=True), "state", "text", box=None, padding=(0, 2))
    for node in nodes:
        state = node.outcome or node.phase or "waiting"
        style = "" if node.outcome in (None, "succeeded", "canceled") else "red"
        table.add_row(node.node, node.job or "-", Text(state, style=style), Text(_shorten(node.text or "")))
    return Group(facts, table)


def choice_table(choice: Choice) -> Table:
    """Return a row for each node that a selector chooses, and then for the others."""
    table = Table(Column("node", no_wrap=True), "chosen", "why", box=None, padding=(0, 2))
    for candidates, mark in ((choice.chosen, Text("yes", style="green")), (choice.others, Text("no"))):
        for candidate in candidates:
            table.add_row(candidate.node, mark, Text(printable(candidate.why)))
    return table


def _format_counts(rollout: RolloutView) -> str:
    """`10: 3 succeeded, 1 failed, 6 waiting`."""
    counts = msgspec.structs.asdict(rollout.counts)
    return f"{rollout.nodes:,}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count)


def datasets_table(datasets: list[DatasetView]) -> Table:
    """Return a row for each dataset of a coordinator."""
    table = Table(Column("dataset", no_wrap=True), "name", "records", "size", "age", box=None, padding=(0, 2))
    for dataset in datasets:
        row = (Text(printable(dataset.name)), f"{dataset.found.records:,}", human_bytes(dataset.size_bytes), _age(dataset.uploaded))
        table.add_row(dataset.sha256, *row)
    return table


def audit_table(requests: list[Audited]) -> Table:
    """Return a row for each request."""
    table = Table(Column("when", no_wrap=True), "who", "from", "what", "made", "status", box=None, padding=(0, 1))
    for r in requests:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(r.time))
        status = Text(str(r.status), style="" if r.status < 400 else "red")
        table.add_row(when, r.who, r.address or "-", Text(printable(r.what)), r.made or "-", status)
    return table


def tokens_table(tokens: list[Token]) -> Table:
    """Return a row for each token."""
    table = Table(Column("token", no_wrap=True), "scope", "age", "expires", box=None, padding=(0, 2))
    for token in tokens:
        expires = "never" if token.expires is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(token.expires))
        over = token.expires is not None and time.time() >= token.expires
        table.add_row(token.name, token.scope, _age(token.created), Text(expires, style="red" if over else ""))
    return table


def checks_table(checks: list[Check]) -> Table:
    """Return a row for each check of `edge-agent doctor`."""
    table = Table.grid(padding=(0, 2))
    for check in checks:
        table.add_row(Text("✓" if check.passed else "✗", style="green" if check.passed else "red"), check.name, Text(printable(check.text)))
    return table


def _age(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def survey_view(survey: Survey) -> Group:
    """Return the plan of a job, stage by stage, why it is so, and what the other rungs would take."""
    plan = survey.plan
    title = f"Plan for {survey.device} (budget {human_bytes(plan.budget_bytes)})"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("stage", "resident", "transient", "peak"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for s in plan.stages:
        style = "bold" if s is plan.binding else ""
        transient = human_bytes(s.transient_bytes) if s.transient_bytes else "-"
        table.add_row(s.name, human_bytes(s.resident_bytes), transient, human_bytes(s.peak_bytes), style=style)
    rungs = Table(title="The ladder, by arithmetic: the smallest settings of every rung", title_justify="left", title_style="bold")
    for name in ("", "settings", "peak", "saves", "time"):
        rungs.add_column(name, justify="left" if name == "settings" else "right")
    for r in survey.rungs:
        style = "bold" if r.number == plan.number else ""
        cells = (human_bytes(r.peak_bytes), human_bytes(r.saves_bytes) if r.saves_bytes else "-", f"x {r.relative_time:.2f}")
        rungs.add_row(str(r.number), r.rung, *cells, style=style)
    why = "everything fits as asked" if plan.number == 0 else "the fastest settings that fit"
    rows = "what rows have in common is computed once" if plan.rows == "shared" else "rows are padded: the architecture reads no trees"
    kept = f"; freed memory is kept: up to {human_bytes(plan.roomy_bytes)}" if plan.keeps_freed else ""
    facts = (
        f"rung {plan.number}: {plan.rung} ({why}); {plan.generate_batch} questions generated at once; {rows}{kept}\n"
        f"{plan.binding.name} binds; the smallest budget that works is {-(-survey.smallest_budget_bytes // 2**20)}MiB"
    )
    return Group(table, Text(facts), rungs)
