"""Real fleets that wait for long, for `make test-all`: `pytest tests/long_fleet.py`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise

import pytest
from fleet import Fleet, wait_for
from orders import NODE
from test_files import S3, SECRET, _sha256, s3  # noqa: F401


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as running:
        yield running


def test_progress_is_as_fast_as_somebody_looks(fleet: Fleet) -> None:
    """Nobody looks: one message in 10 s at most. `edge-agent watch` looks: up to 2 a second, and one in 10 s again after it has ended."""
    view = fleet.submit(fleet.data("watched", 30, 2), schedule__updates=5000)
    fleet.trained(view.id, 1)
    quiet = _times(fleet, view.id)
    stream = fleet.client.watch(view.id)
    for _ in range(14):
        next(stream)
    stream.close()
    watched = [t for t in _times(fleet, view.id) if t not in quiet]
    gaps = [b - a for a, b in pairwise(watched)]
    assert len(gaps) >= 8
    assert min(gaps) > 0.4
    assert sorted(gaps)[len(gaps) // 2] < 5
    last = _times(fleet, view.id)[-1]
    # The watch runs out after 10 s at most; then two messages in a row are 10 s apart.
    wait_for("a pause of 10 s", lambda: any(b - a > 9.5 for a, b in pairwise(_times(fleet, view.id)) if a >= last))
    fleet.client.cancel(view.id)
    assert fleet.ended(view.id).outcome == "canceled"


def _times(fleet: Fleet, job: str) -> list[float]:
    return [t for t, topic, _ in list(fleet.messages) if topic.endswith(f"/up/job/{job}/progress")]


def test_fleet_whose_files_are_in_s3(s3: S3) -> None:  # noqa: F811
    """A real job over a real broker: while S3 is away its result is not acknowledged; from a new disk its adapter is as before."""
    s3.system.mkdir("bucket")
    files = f'[files]\nurl = "s3://bucket/lab"\noptions = {{ endpoint_url = "http://127.0.0.1:{s3.port}" }}\n'
    with Fleet(coordinator=files) as fleet:
        job = fleet.submit(fleet.data(count=4), method__name="sft", schedule__updates=2, evaluation__questions=0, sampling__outputs=1).id
        fleet.trained(job, 1)
        s3.stop()
        wait_for("the warning", lambda: "files_away" in fleet.log("coordinator"))
        [result] = {message["id"] for message in fleet.heard("job", job, "result")}
        acknowledged = f"edge1/default/{NODE}/down/ack/{result}"
        assert fleet.client.job(job).phase == "finalizing"
        fleet.stop("coordinator", 9)
        fleet.start_coordinator()
        assert acknowledged not in {topic for _, topic, _ in fleet.messages}
        s3.start()
        view = fleet.ended(job)
        assert view.outcome == "succeeded"
        wait_for("the acknowledgement", lambda: acknowledged in {topic for _, topic, _ in fleet.messages})
        adapter = fleet.adapter(job)
        fleet.stop("coordinator")
        shutil.rmtree(fleet.directory / "coordinator" / "files")
        fleet.start_coordinator()
        shutil.rmtree(fleet.directory / f"fetched-{job}")
        assert fleet.adapter(job) == adapter
        assert s3.stored()[f"bucket/lab/sha256/{_sha256(adapter)}"] == adapter
        fleet.client.forget(job)
        wait_for("an empty bucket", lambda: s3.names() == [])
        fleet.check_messages()
        assert SECRET not in fleet.log("coordinator")
