"""The cache of quantised models: the same model from it, and nothing that is wrong with it stops a job."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors import safe_open
from test_loading import CPU, PLACES
from transformers.utils import logging as transformers_logging

from edge_agent.config import CACHE_LIMIT_VARIABLE, CACHE_VARIABLE, AgentConfig, Size
from edge_agent.errors import JobSchema
from edge_agent.model_adding import add
from edge_agent.models import list_models, remove
from quantization import cache as caching
from quantization.cache import ModelCache, find_cache, own_weights
from quantization.load import load_model
from quantization.model_files import find_model

torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache", 2**30)


def _entries(cache: ModelCache) -> list[Path]:
    return sorted(cache.directory.iterdir()) if cache.directory.exists() else []


def _load(tiny_model: Path, cache: ModelCache | None, **place: bool) -> dict[str, torch.Tensor]:
    return own_weights(load_model(find_model(str(tiny_model)), CPU, cache=cache, **place))


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in wanted)


@pytest.mark.parametrize("place", PLACES)
def test_model_from_the_cache_is_the_same(tiny_model: Path, cache: ModelCache, place: dict[str, bool]) -> None:
    """Every byte of it, what it answers, and that its two matrices of the vocabulary are one tensor."""
    wanted = load_model(find_model(str(tiny_model)), CPU, cache=cache, **place)
    (entry,) = _entries(cache)
    before = {file: file.stat().st_mtime_ns for file in entry.iterdir()}
    found = load_model(find_model(str(tiny_model)), CPU, cache=cache, **place)
    assert _entries(cache) == [entry]
    assert {file: file.stat().st_mtime_ns for file in entry.iterdir()} == before
    assert _same(own_weights(found), own_weights(wanted))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, wanted(input_ids=ids).logits)
    assert found.get_output_embeddings().weight.data_ptr() == found.get_input_embeddings().weight.data_ptr()
    assert found.generation_config.eos_token_id == wanted.generation_config.eos_token_id


def test_settings_and_files_have_entries_of_their_own(tiny_model: Path, tmp_path: Path, cache: ModelCache) -> None:
    """A head in NF4 is another entry, and so is a model whose file has been written again."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for _ in range(2):
        _load(model, cache)
        _load(model, cache, quantized_head=True)
    assert len(_entries(cache)) == 2
    os.utime(model / "model.safetensors", (1, 1))
    _load(model, cache)
    assert len(_entries(cache)) == 3


@pytest.mark.parametrize("damage", ["a bit", "cut off", "no weights", "header"])
def test_damaged_entry_is_made_again(tiny_model: Path, cache: ModelCache, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with it, the job gets the right model, a line in the log says so, and the next job finds a whole entry."""
    wanted = _load(tiny_model, cache)
    (entry,) = _entries(cache)
    (file,) = entry.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    elif damage == "header":
        content[20] ^= 1
    if damage == "no weights":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut off" else content)
    with caplog.at_level(logging.WARNING):
        assert _same(_load(tiny_model, cache), wanted)
    assert f"model_cache_damaged entry={entry}" in caplog.text
    caplog.clear()
    assert _same(_load(tiny_model, cache), wanted)
    assert "damaged" not in caplog.text
    assert _entries(cache) == [entry]


def test_least_recently_used_entries_go_first(tiny_model: Path, tmp_path: Path) -> None:
    """The limit holds room for two: of three models the one that nobody has used for longest is removed; 0 leaves no directory."""
    _load(tiny_model, ModelCache(tmp_path / "one", 2**30))
    size_bytes = sum(file.stat().st_size for file in (tmp_path / "one").rglob("*.safetensors"))
    cache = ModelCache(tmp_path / "cache", int(2.5 * size_bytes))
    models = [shutil.copytree(tiny_model, tmp_path / f"model{n}") for n in range(3)]
    keys = []
    for n, model in enumerate(models):
        os.utime(model / "model.safetensors", (n + 1, n + 1))
        if n == 2:
            _load(models[0], cache)  # used again, so the second is the oldest
        _load(model, cache)
        keys += [entry.name for entry in _entries(cache) if entry.name not in keys]
    assert {entry.name for entry in _entries(cache)} == {keys[0], keys[2]}
    assert sum(file.stat().st_size for file in cache.directory.rglob("*.safetensors")) <= cache.limit_bytes
    _load(tiny_model, ModelCache(tmp_path / "small", 1000))
    assert not (tmp_path / "small").exists()


def test_what_a_killed_process_has_left_is_removed(tiny_model: Path, cache: ModelCache) -> None:
    """After a day; what another one may still be writing stays."""
    old, new = cache.directory / ".part-old", cache.directory / ".part-new"
    for part in (old, new):
        part.mkdir(parents=True)
        (part / "00000.safetensors").write_bytes(b"x")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    _load(tiny_model, cache)
    assert not old.exists()
    assert new.exists()


def test_cache_that_cannot_be_written_costs_nothing(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model is loaded without it, and a line in the log says why."""
    (tmp_path / "cache").write_text("")
    with caplog.at_level(logging.WARNING):
        assert _load(tiny_model, ModelCache(tmp_path / "cache" / "models", 2**30))
    assert "model_cache_unwritten" in caplog.text


def test_full_disk_means_no_cache(
    tiny_model: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where writing would leave less than the spare room, nothing is written."""
    monkeypatch.setattr(caching, "SPARE_DISK_BYTES", 2**62)
    with caplog.at_level(logging.WARNING):
        assert _load(tiny_model, cache)
    assert "model_cache_disk_full" in caplog.text
    assert _entries(cache) == []


def _load_in_a_process(tiny_model: Path, cache: ModelCache, place: Path) -> None:
    transformers_logging.disable_progress_bar()
    weights = _load(tiny_model, cache)
    place.write_text(str(sum(float(w.double().sum()) for w in weights.values())))


@pytest.mark.slow
def test_two_processes_at_once_leave_one_whole_entry(tiny_model: Path, tmp_path: Path, cache: ModelCache) -> None:
    """Both get the model, and a third one finds the entry."""
    spawn = multiprocessing.get_context("spawn")
    places = [tmp_path / "a", tmp_path / "b"]
    processes = [spawn.Process(target=_load_in_a_process, args=(tiny_model, cache, place)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    wanted = _load(tiny_model, None)
    assert {place.read_text() for place in places} == {str(sum(float(w.double().sum()) for w in wanted.values()))}
    (entry,) = _entries(cache)
    assert _same(_load(tiny_model, cache), wanted)
    assert _entries(cache) == [entry]


def test_entries_are_safetensors_with_digests(tiny_model: Path, cache: ModelCache) -> None:
    """Nothing else is in an entry, and each weight has one."""
    _load(tiny_model, cache)
    (entry,) = _entries(cache)
    assert entry.stat().st_mode & 0o077 == 0
    for file in entry.iterdir():
        with safe_open(file, framework="pt") as opened:
            digests: Any = json.loads(opened.metadata()["sha256"])
            assert digests.keys() == set(opened.keys())


def test_place_and_limit_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The agent's directory, else that of the user; a size with a unit, 0 for no cache, and a wrong one is an error."""
    monkeypatch.setenv(CACHE_LIMIT_VARIABLE, "2GiB")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "agent"))
    assert find_cache() == ModelCache(tmp_path / "agent" / "models", 2**31)
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_cache() == ModelCache(tmp_path / "xdg" / "edge-agent" / "models", 2**31)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_cache() == ModelCache(tmp_path / ".cache" / "edge-agent" / "models", 2**31)
    monkeypatch.setenv(CACHE_LIMIT_VARIABLE, "0")
    assert find_cache() is None
    monkeypatch.setenv(CACHE_LIMIT_VARIABLE, "much")
    with pytest.raises(JobSchema, match=CACHE_LIMIT_VARIABLE):
        find_cache()


def test_command_keeps_the_model_it_has_quantised(tiny_model: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """`edge-agent evaluate` twice: the second one reads the entry of the first, and measures the same."""
    monkeypatch.setenv(CACHE_LIMIT_VARIABLE, "1GiB")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "What is 2 plus 3?", "answer": "5"}\n')
    arguments = "evaluate", "--model", tiny_model, "--data", data, "--max-new-tokens", 8, "--device", "cpu", "--json"
    first, second = cli(*arguments), cli(*arguments)
    (entry,) = (tmp_path / "cache" / "models").iterdir()
    assert (first.code, second.code) == (0, 0), (first.err, second.err)
    assert first.json["answers"] == second.json["answers"]
    assert entry.stat().st_mtime >= max(file.stat().st_mtime for file in entry.iterdir())


def test_model_that_is_added_is_in_the_cache_before_its_first_job(tiny_model: Path, tmp_path: Path) -> None:
    """What a trainer would load is what it reads, in the place where the agent's trainers look; `remove` takes it away."""
    config = AgentConfig("node-1", tmp_path / "node", Size(2**30), device="cpu")
    added = add(config, str(tiny_model), "tiny", None, True, lambda *_: lambda _: None)
    assert (added.quantised, added.note) == (True, None)
    cache = ModelCache(config.cache_directory / "models", 2**30)
    (entry,) = _entries(cache)
    before = {file: file.stat().st_mtime_ns for file in entry.iterdir()}
    found = own_weights(load_model(find_model(added.path), CPU, cache=cache))
    assert _entries(cache) == [entry]
    assert {file: file.stat().st_mtime_ns for file in entry.iterdir()} == before
    assert _same(found, _load(tiny_model, None))
    assert [view.quantised_bytes for view in list_models(config)] == [sum(file.stat().st_size for file in before)]
    remove(config, "tiny")
    assert _entries(cache) == []
