"""What a coordinator counts and measures, for Prometheus. Counters begin anew with every start of the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_agent.messages import JobResult

RUN_BUCKETS = (10, 30, 60, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 24 * 3600)
"""Seconds."""
PEAK_BUCKETS = tuple(2**30 * size for size in (0.5, 1, 2, 4, 6, 8, 12, 16, 24, 48, 96))
"""Bytes."""
PREFIX = "edge_agent"


@dataclass(frozen=True)
class Standing:
    """How things stand when somebody asks."""

    nodes: dict[str, int]
    """By their state."""
    jobs: dict[tuple[str, str], int]
    """By phase and outcome, the empty text where there is none yet."""
    waiting: int
    """Offers and commands that a node has not answered."""
    listeners: int
    late: int
    dropped: int
    connected: bool
    rollouts: dict[str, int]
    """By their state."""
    files: int
    """To be stored in the object store, or deleted there."""


class Metrics:
    """Those of one coordinator. Any thread may count."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.received = self._counter("messages_received", "Messages of nodes, by what they are about.", "kind")
        self.refused = self._counter("messages_refused", "Messages of nodes that do not follow the contract.")
        self.gaps = self._counter("messages_missed", "Times that the number of a message told of one that was missing.")
        self.requests = self._counter("api_requests", "Answers of the API.", "method", "route", "status")
        self._run_s = Histogram(f"{PREFIX}_job_seconds", "Of ended jobs.", ["outcome"], registry=self._registry, buckets=RUN_BUCKETS)
        self._peak = Histogram(f"{PREFIX}_job_peak_bytes", "Memory at most, of ended jobs.", registry=self._registry, buckets=PEAK_BUCKETS)

        self._energy = self._counter("job_energy_joules", "Of ended jobs whose node measures it.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def watch(self, look: Callable[[], Standing]) -> None:
        """Ask how things stand whenever somebody reads."""
        self._registry.register(_Gauges(look))

    def ended(self, result: JobResult) -> None:
        """Take in the result of a job that has ended."""
        if result.seconds is not None:
            self._run_s.labels(result.outcome).observe(result.seconds)
        if result.peak_bytes is not None:
            self._peak.observe(result.peak_bytes)
        if result.energy_j is not None:
            self._energy.inc(result.energy_j)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, look: Callable[[], Standing]) -> None:
        self._look = look

    def describe(self) -> Iterator[Metric]:
        """Nothing: how things stand is asked when somebody reads, not before."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        now = self._look()
        nodes = GaugeMetricFamily(f"{PREFIX}_nodes", "Nodes that have ever been seen, by their state.", labels=["state"])
        for state, count in now.nodes.items():
            nodes.add_metric([state], count)
        jobs = GaugeMetricFamily(f"{PREFIX}_jobs", "Jobs that are kept, by phase and outcome.", labels=["phase", "outcome"])
        for labels, count in now.jobs.items():
            jobs.add_metric(labels, count)
        rollouts = GaugeMetricFamily(f"{PREFIX}_rollouts", "Rollouts that are kept, by their state.", labels=["state"])
        for state, count in now.rollouts.items():
            rollouts.add_metric([state], count)
        yield nodes
        yield jobs
        yield rollouts
        yield GaugeMetricFamily(f"{PREFIX}_unanswered", "Offers and commands that a node has not answered yet.", now.waiting)
        yield CounterMetricFamily(f"{PREFIX}_messages_late", "Messages that came after newer ones and changed nothing.", now.late)
        yield CounterMetricFamily(f"{PREFIX}_messages_dropped", "Messages that came faster than they were handled.", now.dropped)
        yield GaugeMetricFamily(f"{PREFIX}_files_waiting", "Files to be stored in the object store, or deleted there.", now.files)
        yield GaugeMetricFamily(f"{PREFIX}_listeners", "Readers of events.", now.listeners)
        yield GaugeMetricFamily(f"{PREFIX}_broker_connected", "1 where the broker is connected.", now.connected)
