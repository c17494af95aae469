"""Bad input gives its own clear error with a stable code, and leaves the directory usable for the same command, mended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from conftest import DEADLINE_S, Cli, write_domain

from edge_agent.dataset import read_records
from edge_agent.errors import DatasetTooLarge, JobSchema
from edge_agent.job_building import build_change, build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.training import prepare

QUICK = ("--questions", 4, "--set", "schedule.updates=2", "--set", "evaluation.max_new_tokens=16", "--set", "sampling.outputs=1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_domain(tmp_path / "data.jsonl", "chain", 20, 2)


def _train(data: Path, out: Path, model: Path | str, budget: str = "1GiB") -> list[object]:
    return ["train", "--model", model, "--data", data, "--out", out, "--budget", budget, *QUICK, "--json"]


def _refused(cli: Cli, arguments: list[object], code: str, exit_code: int, state: Path | None = None) -> str:
    ran = cli(*arguments, state=state)
    assert ran.code == exit_code, ran.out + ran.err
    assert ran.json["error"]["code"] == code
    return str(ran.json["error"]["text"])


def _append(path: Path, *lines: bytes) -> Path:
    with path.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"question": "a", "answer": "1"', "line 21: it is no whole JSON object: Input data was truncated"),
        (b'{"question": "a", "answer": "1", "anwser": "2"}', "line 21: Object contains unknown field `anwser`"),
        (b'{"question": "a"}', "line 21: it has neither an `answer` nor an `output`"),
        (b'{"answer": "1"}', "line 21: Object missing required field `question`"),
        (b'{"question": "a", "answer": 5}', "line 21: Expected `str | null`, got `int` - at `$.answer`"),
        (b'{"question": "\xff", "answer": "1"}', "line 21: "),
        (b'{"question": " ", "answer": "1"}', "line 21: `question` is blank"),
        (b'["question"]', "line 21: Expected `object`, got `array`"),
    ],
)
def test_a_broken_line_is_named(line: bytes, says: str, data: Path, cli: Cli) -> None:
    """The error names file, line and field; nothing else is said of the text."""
    text = _refused(cli, ["dataset", "check", _append(data, line), "--json"], "dataset_schema", 3)
    assert text.startswith(f"data.jsonl, {says}")


@pytest.mark.slow
def test_broken_data_mended_trains_in_the_same_directory(data: Path, tmp_path: Path, cli: Cli, tiny_model: Path) -> None:
    """A broken line, then a dataset without records, then a record without a number, then a record longer than the model's
    context, then a budget below the floor, an unknown model and an unknown field: each is refused, and the mended command
    trains in the directory that all of them used."""
    good, out = data.read_bytes(), tmp_path / "job"
    _refused(cli, _train(_append(data, b"{"), out, tiny_model), "dataset_schema", 3)
    data.write_bytes(b"\n")
    _refused(cli, _train(data, out, tiny_model), "dataset_empty", 3)
    data.write_bytes(good + b'{"question": "who?", "answer": "nobody"}\n')
    assert "record line-21: its answer holds nothing" in _refused(cli, _train(data, out, tiny_model), "dataset_schema", 3)
    data.write_bytes(good + json.dumps({"question": "how many? " * 900, "answer": "#### 3"}).encode() + b"\n")
    text = _refused(cli, [*_train(data, out, tiny_model), "--set", "evaluation.held_out=0"], "record_too_long", 3)
    assert "record line-21" in text
    assert "the model's context has 2,048" in text
    data.write_bytes(good)
    text = _refused(cli, _train(data, out, tiny_model, "300MiB"), "oom_predicted", 6)
    assert "raise --budget to at least" in text
    _refused(cli, _train(data, out, "nobody/no-such-model"), "model_missing", 5)
    _refused(cli, [*_train(data, out, tiny_model), "--set", "schedule.epoch=2"], "job_schema", 4)
    ran = cli(*_train(data, out, tiny_model))
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["state"] == "succeeded"


def test_what_is_no_job_directory_or_dataset_is_named(data: Path, tmp_path: Path, cli: Cli, tiny_model: Path) -> None:
    """A file where a directory belongs, a directory where a file belongs, a dataset that is not there."""
    (tmp_path / "odd" / "job.json").mkdir(parents=True)
    for command, place in (("train", data), ("plan", data), ("train", tmp_path / "odd")):
        _refused(cli, [command, place, "--json"], "job_schema", 4)
    for missing in (tmp_path / "none.jsonl", tmp_path):
        _refused(cli, ["evaluate", "--model", tiny_model, "--data", missing, "--json"], "dataset_empty", 3)


def test_a_job_has_its_own_copy_of_its_files(data: Path, tmp_path: Path, tiny_model: Path) -> None:
    """A dataset that is edited later, in place, changes no job."""
    job = build_job(str(tiny_model), data, None, {"budget_bytes": 2**30}, [])
    directory = JobDirectory(tmp_path / "job")
    directory.create(job, data, None)
    with data.open("ab") as file:
        file.write(b"{}\n")
    assert directory.read_dataset(job)[0]


@pytest.mark.slow
def test_the_smallest_budget_that_is_named_works(data: Path, tmp_path: Path, cli: Cli, cold_cli: Cli, tiny_model: Path) -> None:
    """A refusal names the budget that is enough; with it the job runs and stays below it. So it is with what a job has taught."""
    enough, state = list[str](), tmp_path / "state"
    state.mkdir()
    for name in ("untaught", "taught"):
        text = _refused(cli, _train(data, tmp_path / name, tiny_model, "300MiB"), "oom_predicted", 6, state=state)
        enough.append(text.partition("at least ")[2].partition(",")[0])
        ran = cold_cli(*_train(data, tmp_path / name, tiny_model, enough[-1]), state=state)
        assert ran.code == 0, ran.out + ran.err
        assert ran.json["misses"] == []
        assert ran.json["peak_bytes"] <= ran.json["budget_bytes"]
    assert enough[0] != enough[1]


def test_records_take_no_more_memory_than_the_budget_has(
    data: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large file are refused while they are read: a text that holds one wide character takes four bytes for each of its own."""
    wide = _append(tmp_path / "wide.jsonl", *(b'{"question": "' + "😀".encode() + b"x" * 1000 + b'", "answer": "1"}' for _ in range(100)))
    assert len(read_records(wide, 500_000)) == 100
    with pytest.raises(DatasetTooLarge, match=r"the text up to line 94 is over the limit of .* of memory that the budget leaves"):
        read_records(wide, 400_000)
    monkeypatch.setattr(prepare, "LEAST_ROOM_BYTES", 400_000)
    job = build_job(str(tiny_model), data, wide, {"budget_bytes": 2**20}, [])
    directory = JobDirectory(tmp_path / "job")
    directory.create(job, data, wide)
    with pytest.raises(DatasetTooLarge, match=r"evaluation\.jsonl"):
        prepare.prepare(directory, job)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 7},
        {"hidden_size": "192"},
        {"num_key_value_heads": 0},
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "zzz"}},
        {"model_type": 5},
        {"pad_token_id": 99_999_999},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_configuration_that_no_model_has_is_named(
    fields: dict[str, object], data: Path, tmp_path: Path, tiny_model: Path, cli: Cli
) -> None:
    """Wrong types, names that do not exist, and sizes that do not go together: refused before anything is loaded."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    assert "raceback" not in _refused(cli, ["plan", "--model", model, "--data", data, "--budget", "1GiB", "--json"], "model_unsupported", 5)


def test_a_job_document_is_strict(data: Path, tmp_path: Path, cli: Cli, tiny_model: Path) -> None:
    """Unknown field, wrong digest and another job in the same directory, each named; the restored directory trains."""
    out = tmp_path / "job"
    assert cli(*_train(data, out, tiny_model, "300MiB")).code == 6
    document = json.loads((out / "job.json").read_text())
    (out / "job.json").write_text(json.dumps(document | {"command": "rm"}))
    assert "unknown field `command`" in _refused(cli, ["train", out, "--json"], "job_schema", 4)
    (out / "job.json").write_text(json.dumps(document | {"budget_bytes": 2**30}))
    original = (out / "dataset.jsonl").read_bytes()
    (out / "dataset.jsonl").write_bytes(original + b"\n")
    _refused(cli, ["train", out, "--json"], "dataset_checksum", 3)
    (out / "dataset.jsonl").write_bytes(original)
    assert cli("train", out, "--json").code == 0
    _refused(cli, [*_train(data, out, tiny_model), "--seed", 9], "conflict", 4)


def test_a_directory_with_other_files_is_left_alone(data: Path, tmp_path: Path, cli: Cli, tiny_model: Path) -> None:
    """`--out` on a directory that holds somebody's files changes nothing in it."""
    out = tmp_path / "mine"
    (out / "adapter").mkdir(parents=True)
    (out / "adapter" / "notes.txt").write_text("keep")
    (out / "dataset.jsonl").write_text("keep")
    assert "it holds other files" in _refused(cli, _train(data, out, tiny_model), "directory", 4)
    assert (out / "adapter" / "notes.txt").read_text() == (out / "dataset.jsonl").read_text() == "keep"


def test_one_record_trains_and_says_that_nothing_was_measured(tmp_path: Path, cli: Cli, tiny_model: Path) -> None:
    """A tokenizer without a padding token, one record, nothing held out: the job succeeds and gives the reason for no accuracy."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    one = write_domain(tmp_path / "one.jsonl", "chain", 1, 2)
    ran = cli(*_train(one, tmp_path / "job", model))
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["accuracy"]["after"] is None
    assert "no question was held out" in ran.json["accuracy"]["reason"]


def test_models_that_run_code_are_refused(data: Path, tmp_path: Path, cli: Cli, tiny_model: Path) -> None:
    """Pickled weights only: refused before anything is loaded, and the same command works with safetensors in place."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").rename(tmp_path / "kept")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights only" in _refused(cli, _train(data, tmp_path / "job", model), "model_unsafe", 5)
    (tmp_path / "kept").rename(model / "model.safetensors")
    assert cli(*_train(data, tmp_path / "job", model)).code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 40 MiB."""
    with disks.small_disk(tmp_path / "disk", 40) as place:
        yield place


def _fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file:
        free = shutil.disk_usage(place).free
        while free:
            file.write(b"\0" * free)
            free = shutil.disk_usage(place).free


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(small_disk: Path, data: Path, cli: Cli, tiny_model: Path) -> None:
    """Full before the run, then filled while it trains: `disk_full` both times; with room again the same command finishes."""
    out = small_disk / "job"
    arguments = [*_train(data, out, tiny_model), "--set", "schedule.updates=30", "--set", "schedule.checkpoint_s=0"]
    (small_disk / "filler").write_bytes(b"\0" * 30 * 2**20)
    assert "free some space" in _refused(cli, arguments, "disk_full", 8)
    (small_disk / "filler").unlink()
    command = [sys.executable, "-m", "edge_agent", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not (out / "checkpoint.safetensors").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            _fill(small_disk)
            stdout, stderr = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 8, stderr.decode()
    assert json.loads(stdout)["error"]["code"] == "disk_full"
    (small_disk / "filler").unlink()
    ran = cli(*arguments)
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["resumed"] is True
    assert ran.json["updates"] == 30


@pytest.mark.parametrize("wrong", [[], ["schedule.updates=3"], ["method=nlft"], ["method.correct_threshold=0.5", "seed=1"]])
def test_change_of_a_job_that_runs_is_of_its_method_only(wrong: list[str]) -> None:
    """Other fields, the name of a method and nothing at all are refused before a coordinator is asked."""
    assert build_change(["method.correct_threshold=0.5", "method.cluster_max_span=null"]) == {
        "correct_threshold": 0.5,
        "cluster_max_span": None,
    }
    with pytest.raises(JobSchema, match="only fields of `method` can change while a job runs"):
        build_change(wrong)
