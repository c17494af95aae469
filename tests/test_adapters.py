"""What becomes of adapters: handed on as weights, as PEFT's files and for llama.cpp, tried beside the base model, and merged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import gguf
import msgspec
import pytest
import torch
from api_server import INFO, ApiServer
from conftest import write_domain
from orders import NODE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from edge_agent.adapters.chat import CHAT_SEED
from edge_agent.adapters.merge import Options, check, combine, load_parts
from edge_agent.adapters.report import Method
from edge_agent.adapters.source import CONFIG, PREFIX, WEIGHTS, A, B, Source, find_source
from edge_agent.answers import Answer
from edge_agent.cli import app
from edge_agent.cli.adapters import FETCHED
from edge_agent.coordinator.rollout import RolloutPlan
from edge_agent.errors import AdapterMismatch, JobSchema
from edge_agent.job import Dataset, Job, Lora
from edge_agent.job_directory import JobDirectory
from edge_agent.messages import Artifact, JobResult, NodeState, encode
from edge_agent.prompts import PROMPTS
from edge_agent.training.contexts import prompt_ids
from profiles.device import device_profile
from quantization.adapter import attach_adapter, load_adapter, save_adapter
from quantization.load import load_model
from quantization.model_files import find_model

RANK = 4


def _run(*arguments: object, stdin: str | None = None) -> Any:
    """Run a command in this process, which has loaded its libraries already."""
    torch.set_num_threads(1)
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def _json(*arguments: object) -> Any:
    ran = _run(*arguments, "--json")
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def questions(base: Path) -> Path:
    return write_domain(base / "questions.jsonl", "chain", 3, 99)


@pytest.fixture(scope="module")
def job(base: Path, tiny_model: Path, questions: Path) -> Path:
    """A job of a few updates that are large enough to change answers."""
    data = write_domain(base / "chain.jsonl", "chain", 8, 1)
    ran = _run(
        "train", "--model", tiny_model, "--data", data, "--eval-data", questions, "--budget", "2GiB", "--out", base / "job",
        "--method", "sft", "--learning-rate", 0.005, "--set", "schedule.updates=4", "--set", "evaluation.max_new_tokens=40",
        "--set", f"lora.rank={RANK}", "--set", "evaluation.accept_if=always",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    return base / "job"


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Callable[[], Any]:
    """The shipped model in NF4, anew each time."""
    torch.set_num_threads(1)
    files = find_model(str(tiny_model))
    return lambda: load_model(files, device_profile("cpu"))


@pytest.fixture(scope="module")
def drawn(base: Path, loaded: Callable[[], Any]) -> dict[str, Path]:
    """Adapters that nobody has trained: A and B drawn, without a report; "other" and "wide" differ in matrices and rank."""
    kinds = {"one": Lora(rank=RANK, alpha=8), "two": Lora(rank=RANK), "wide": Lora(rank=RANK + 2), "other": Lora(rank=RANK, targets="mlp")}
    model, places = loaded(), {}
    for seed, (name, lora) in enumerate(kinds.items()):
        adapted = attach_adapter(model, lora, seed, "tiny")
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.05, generator=generator)
        places[name] = base / name / "adapter"
        places[name].parent.mkdir()
        save_adapter(adapted, places[name], "tiny")
        model = adapted.unload()
    return places


def _products(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the change B A of every matrix, times its factor."""
    source, weights = find_source(adapter), load_file(find_source(adapter).adapter / WEIGHTS)
    return {m: source.lora.scaling * weights[PREFIX + m + B] @ weights[PREFIX + m + A] for m in source.matrices}


# Handing on


@pytest.mark.slow
def test_merged_model_answers_as_base_and_adapter(job: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Plain transformers loads it with its tokenizer and template; logits are those of base and adapter but for the rounding, and told."""
    report = _json("export", job, "--out", tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()} - {"export.json"}
    assert set(report["files"]) == written >= {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"}
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == report
    assert (report["base"], report["dtype"]) == ("stored", "bfloat16")
    assert report["peak_bytes"] > report["size_bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in written)
    model, plain = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in (tmp_path / "out", tiny_model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = json.loads((job / "evaluation.jsonl").read_text().splitlines()[0])["question"]
    ids = torch.tensor([prompt_ids(tokenizer, PROMPTS["worked"].messages(question))])

    def answer(model: Any) -> tuple[torch.Tensor, str]:
        with torch.no_grad():
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
            return model(ids).logits, tokenizer.decode(written[0, ids.shape[1] :])

    (before, untrained), (wanted, said), (found, merged) = answer(plain), answer(load_adapter(plain, job / "adapter")), answer(model)
    assert merged == said != untrained
    assert 5 * float((found - wanted).norm()) < float((before - wanted).norm())
    assert 0 < report["difference"] < 0.02


def test_merged_into_nf4_is_what_was_measured(
    job: Path, loaded: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged into the rounded weights a model is nearer to what the job measured than merged into the stored ones; in several files too."""
    monkeypatch.setattr("edge_agent.adapters.export.SHARD", "1MB")
    model = load_adapter(loaded(), job / "adapter")
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        wanted = model(ids).logits.float()
        apart = {}
        for kind in ("stored", "nf4"):
            report = _json("export", job, "--out", tmp_path / kind, "--base", kind)
            assert (report["base"], "model.safetensors.index.json" in report["files"]) == (kind, True)
            found = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)(ids).logits
            apart[kind] = float((found - wanted).norm() / wanted.norm())
    assert apart["nf4"] < 0.2 * apart["stored"], apart


def test_gguf_file_holds_the_adapter(job: Path, tmp_path: Path) -> None:
    """Read by gguf's own reader: a LoRA's metadata, and of every matrix the same B A, of queries and keys in llama.cpp's order of rows."""
    assert _json("export", job, "--out", tmp_path / "out", "--format", "gguf")["files"] == ["adapter.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
    assert {name: fields[name] for name in wanted} == wanted
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }  # fmt: skip
    heads = {"q_proj": 6, "k_proj": 3}
    products = _products(job / "adapter")
    assert len(tensors) == 2 * len(products)
    for module, change_OI in products.items():
        _, _, layer, _, last = module.split(".")
        name = f"blk.{layer}.{names[last]}.weight"
        found_OI = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"] * 16 / RANK
        if last in heads:
            rows = torch.arange(len(change_OI)).view(heads[last], 2, -1).transpose(1, 2).flatten()  # 0, 16, 1, 17, ... of a head of 32
            assert rows[:4].tolist() == [0, 16, 1, 17]
            change_OI = change_OI[rows]
        torch.testing.assert_close(found_OI, change_OI, rtol=1e-4, atol=1e-6)


def test_adapter_is_handed_on_as_it_is(job: Path, tmp_path: Path) -> None:
    """PEFT's two files, byte by byte, and a report; a place that holds something is left as it is."""
    _json("export", job, "--out", tmp_path / "out", "--format", "adapter")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (job / "adapter" / name).read_bytes()
    again = _run("export", job, "--out", tmp_path / "out", "--format", "adapter")
    assert (again.exit_code, "error directory" in again.stderr) == (4, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_architecture_that_llama_cpp_has_otherwise(drawn: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """Matrices that are not there one to one are no file: an error says what to take instead, and nothing is left behind."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    ran = _run("export", drawn["one"], "--model", model, "--out", tmp_path / "out", "--format", "gguf")
    assert ran.exit_code == 5
    assert "error model_unsupported" in ran.stderr
    assert "take --format merged" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Where adapters come from


def test_adapter_of_another_model_is_refused(job: Path, tiny_model: Path, tmp_path: Path) -> None:
    """By the fingerprint in its report, where only the tokenizer's template differs."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text("{{ messages[1].content }}")
    for command in (("export", job, "--out", tmp_path / "out"), ("chat", job, "--question", "1 + 1?")):
        ran = _run(*command, "--model", model)
        assert (ran.exit_code, "error adapter_mismatch" in ran.stderr, "fingerprint" in ran.stderr) == (5, True, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "no plain LoRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "no plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "no plain LoRA"),
        ({"r": 3}, "no plain LoRA"),
        ({"target_modules": "(a*)*b"}, "no plain LoRA"),
        ({"init_lora_weights": "pissa"}, "no plain LoRA"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"exclude_modules": "(.+)+x"}, "exclude_modules"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"what_comes_next_year": 1}, "what_comes_next_year"),
    ],
)
def test_what_is_no_plain_lora_is_refused(change: dict[str, Any], said: str, drawn: dict[str, Path], tmp_path: Path) -> None:
    """An adapter comes from elsewhere: what would import a package, match a pattern or change the base model is never loaded."""
    shutil.copytree(drawn["one"], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(AdapterMismatch, match=said):
        find_source(tmp_path / "adapter")


def test_weights_that_are_not_those_of_the_report(job: Path, drawn: dict[str, Path], tmp_path: Path) -> None:
    """Weights that were changed since are told by their digest; broken ones, or others than pairs of LoRA, by what they hold."""
    shutil.copytree(job, tmp_path / "job")
    (tmp_path / "job" / "adapter" / WEIGHTS).write_bytes((drawn["two"] / WEIGHTS).read_bytes())
    with pytest.raises(AdapterMismatch, match="its report names"):
        find_source(tmp_path / "job")
    shutil.copytree(drawn["one"], tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(AdapterMismatch, match="cannot be read"):
        find_source(tmp_path / "adapter")
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(AdapterMismatch, match="not pairs"):
        find_source(tmp_path / "adapter")


# Side by side


def test_chat_says_what_was_measured(job: Path, questions: Path) -> None:
    """Base and adapter answer a held-out question as they did before and after training, with the job's prompts and limits."""
    before, after = (JobDirectory(job).read_rows(name, Answer) or [] for name in ("before.jsonl", "after.jsonl"))
    said = _run("chat", job, "--json", stdin="\n".join(row.question for row in before) + "\n\nnot asked\n")
    assert said.exit_code == 0, said.output
    decoder, text, replies = json.JSONDecoder(), said.stdout, []
    while text.strip():
        reply, end = decoder.raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        replies.append(reply)
    assert [r["question"] for r in replies] == [row.question for row in before]
    assert [r["base"]["text"] for r in replies] == [row.outputs[0] for row in before]
    assert [r["adapter"]["text"] for r in replies] == [row.outputs[0] for row in after]
    assert replies[0]["base"]["text"] != replies[0]["adapter"]["text"]


def test_chat_without_a_job(drawn: dict[str, Path], tiny_model: Path) -> None:
    """With a model alone it answers alone, sampled answers depend on the seed only, and both are shown one below the other."""
    alone = [_json("chat", "--model", tiny_model, "--question", "2 + 2?", "--max-new-tokens", 8, "--temperature", 1.5) for _ in range(2)]
    assert alone[0]["adapter"] is None
    assert alone[0]["base"]["text"] == alone[1]["base"]["text"], f"the seed is {CHAT_SEED}"
    assert 0 < alone[0]["base"]["tokens"] <= 8
    both = _run("chat", "--model", tiny_model, "--adapter", drawn["one"], "--question", "2 + 2?", "--max-new-tokens", 4, "--budget", "1GiB")
    assert both.exit_code == 0, both.output
    assert both.stdout.index("base") < both.stdout.index("adapter")
    assert _run("chat", "--question", "2 + 2?").exit_code == 2
    long = _run("chat", "--model", tiny_model, "--question", "word " * 3000)
    assert (long.exit_code, "error record_too_long" in long.stderr) == (3, True)


# Merging


def test_exact_methods_average_the_changes(drawn: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """`cat`, and `svd` of enough rank, are the weighted average of B A, with factors and ranks that differ; `linear` is something else."""
    one, two = (_products(drawn[name]) for name in ("one", "wide"))
    wanted = {name: 0.75 * one[name] + 0.25 * two[name] for name in one}
    for method, more in (("cat", ()), ("svd", ("--rank", 2 * RANK + 2))):
        report = _json(
            "merge", drawn["one"], drawn["wide"], "--model", tiny_model, "--out", tmp_path / method, "--weights", "3,1",
            "--method", method, *more,
        )  # fmt: skip
        assert (report["rank"], [part["weight"] for part in report["parts"]]) == (2 * RANK + 2, [0.75, 0.25])
        assert (report["held_out"], report["against"], report["density"]) == (0, [], None)
        for name, change_OI in _products(tmp_path / method).items():
            torch.testing.assert_close(change_OI, wanted[name], rtol=1e-3, atol=1e-6)
    _json("merge", drawn["one"], drawn["two"], "--model", tiny_model, "--out", tmp_path / "linear", "--method", "linear")
    average, found = [_products(drawn[n]) for n in ("one", "two")], _products(tmp_path / "linear")
    name = next(iter(found))
    exact = (average[0][name] + average[1][name]) / 2
    assert float((found[name] - exact).norm() / exact.norm()) > 0.2


def test_adapters_that_agree_stay_as_they_are(drawn: dict[str, Path], tiny_model: Path, base: Path) -> None:
    """Equal adapters, merged with nearly all numbers kept, are that adapter: no method shrinks or grows what all agree on."""
    model, wanted = load_parts(find_model(str(tiny_model)), [find_source(drawn["one"])] * 3, "cpu"), _products(drawn["one"])
    for method in get_args(Method):
        combine(model, [0.2, 0.3, 0.5], Options(method=method, density=0.999), method)
        (base / f"same-{method}").mkdir()
        save_adapter(model, base / f"same-{method}" / "adapter", "tiny", method)
        found = _products(base / f"same-{method}" / "adapter")
        assert max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted) < 0.15, method


def test_merge_is_measured_beside_its_parts(job: Path, drawn: dict[str, Path], questions: Path, tiny_model: Path, tmp_path: Path) -> None:
    """With the job's own prompts and limits, on the same questions: the base model and the part answer as its job measured them."""
    out = tmp_path / "out"
    report = _json("merge", job, drawn["two"], "--out", out, "--evaluate", questions)
    assert (report["held_out"], [held["name"] for held in report["against"]]) == (3, ["base", str(job), str(drawn["two"])])
    assert [part["weight"] for part in report["parts"]] == [0.5, 0.5], "of one part nobody knows the questions"
    assert [part["fingerprint_known"] for part in report["parts"]] == [True, False]
    rows = {name: JobDirectory(out).read_rows(f"{name}.jsonl", Answer) for name in ("base", "part-1", "merged")}
    before, after = (JobDirectory(job).read_rows(name, Answer) for name in ("before.jsonl", "after.jsonl"))
    assert (rows["base"], rows["part-1"]) == (before, after)
    [own] = {held["merged"]["after"]["value"] for held in report["against"]}
    assert own == report["accuracy"]["value"] == sum(row.share for row in rows["merged"] or []) / 3
    assert _run("compare", out / "base.jsonl", out / "merged.jsonl").exit_code == 0
    merged = find_source(out)
    assert (merged.fingerprint, merged.lora.r) == (find_source(job).fingerprint, 2 * RANK)
    shown = _run("merge", out, drawn["two"], "--out", tmp_path / "again")
    assert shown.exit_code == 0, shown.output
    assert "not measured" in shown.stdout


def test_adapters_that_do_not_go_together(job: Path, drawn: dict[str, Path], tiny_model: Path) -> None:
    """Other matrices, ranks that a method cannot do with, another base model, and options that say nothing: refused before a load."""
    model = str(tiny_model)
    one, two, wide, other = (find_source(drawn[name]) for name in ("one", "two", "wide", "other"))
    rooted = dataclasses.replace(two, lora=msgspec.structs.replace(two.lora, use_rslora=True))
    stranger = Source(**{**vars(find_source(job)), "fingerprint": "0" * 64})
    refused: list[tuple[type[Exception], str, tuple[Source, ...], dict[str, Any]]] = [
        (AdapterMismatch, "other matrices", (one, other), {}),
        (AdapterMismatch, "it has rank 6", (one, wide), {"method": "linear"}),
        (AdapterMismatch, "its base model is another one", (find_source(job), stranger), {}),
        (AdapterMismatch, "it was trained|its base model has", (stranger, one), {}),
        (JobSchema, "two adapters", (one,), {}),
        (JobSchema, "2 numbers above 0", (one, two), {"weights": (1.0,)}),
        (JobSchema, "2 numbers above 0", (one, two), {"weights": (1.0, -1.0)}),
        (JobSchema, "above 0 and below 1", (one, two), {"density": 1.0}),
        (JobSchema, "ends in svd", (one, two), {"rank": 8}),
        (JobSchema, "has 96 rows or columns", (one, two), {"method": "svd", "rank": 97}),
        (AdapterMismatch, "rsLoRA", (one, rooted), {}),
    ]
    for error, said, sources, options in refused:
        with pytest.raises(error, match=said):
            check(sources, model, Options(**options))
    ran = _run("merge", drawn["one"], drawn["two"], "--out", drawn["one"].parent / "x", "--method", "mean", "--model", model)
    assert (ran.exit_code, "error job_schema" in ran.stderr) == (4, True)


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ExitStack() as ends:
        coordinator = ApiServer(tmp_path / "api", ends)
        for name, value in (("CA_FILE", coordinator.ca_file), ("TOKEN_FILE", coordinator.token_file("read")), ("URL", coordinator.url)):
            monkeypatch.setenv(f"EDGE_AGENT_{name}", str(value))
        yield coordinator


def test_rollout_ends_with_a_merge(coordinator: ApiServer, job: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Its jobs draw with seeds of their own; of those that succeeded adapter and report are fetched, nothing of the data, and merged."""
    fingerprint = find_model(str(tiny_model)).fingerprint
    nodes = [NODE, "other", "failing"]

    def hear(node: str, kind: str, data: object, *parts: str) -> None:
        coordinator.call(lambda: coordinator.service._receive_up(node, [kind, *parts], encode(data, "test"), False))

    for node in nodes:
        hear(node, "state", NodeState("ready", 1, 1, 0))
        hear(node, "info", msgspec.structs.replace(INFO, models={"tiny": fingerprint}))
    sha256 = hashlib.sha256((job / "dataset.jsonl").read_bytes()).hexdigest()
    coordinator.client("submit").upload(job / "dataset.jsonl", sha256)
    plan = RolloutPlan(job=Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**29, seed=7), seeds="each")
    rollout = coordinator.call(lambda: coordinator.service.roll_out(plan, False)).rollout
    assert rollout is not None
    for moment in range(5):
        coordinator.call(lambda m=moment: coordinator.service._rollouts.tick(time.monotonic() + m))  # type: ignore[misc]
    views = {view.node: view for view in coordinator.client("read").jobs(9)}
    assert [views[node].order.job.seed for node in sorted(nodes)] == [7, 8, 9]
    contents = {name: (job / "adapter" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    contents |= {"result.json": (job / "result.json").read_bytes(), "saliency.json": b"texts of the dataset"}
    artifacts = tuple(Artifact(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items())  # type: ignore[arg-type]
    for data in contents.values():
        coordinator.service.files.put(data, hashlib.sha256(data).hexdigest())
    for node in nodes:
        good = node != "failing"
        result = JobResult(views[node].digest, "succeeded" if good else "failed", artifacts=artifacts if good else ())
        hear(node, "job", result, views[node].id, "result")
    coordinator.call(lambda: coordinator.service._rollouts.tick(time.monotonic() + 60))
    report = _json("rollout", "merge", rollout.id, "--model", tiny_model, "--out", tmp_path / "out")
    assert [part["name"] for part in report["parts"]] == [views[node].id for node in (NODE, "other")]
    assert [(part["questions"], part["weight"]) for part in report["parts"]] == [(8, 0.5), (8, 0.5)]
    wanted = _products(job / "adapter")
    for name, change_OI in _products(tmp_path / "out").items():
        torch.testing.assert_close(change_OI, wanted[name], rtol=1e-3, atol=1e-6)
    fetched = coordinator.client("read").fetch(views[NODE].id, tmp_path / "fetched", FETCHED)
    assert sorted(path.name for path in fetched) == [CONFIG, WEIGHTS, "result.json"]
    by_id = _run("merge", views[NODE].id, job, "--model", tiny_model, "--out", tmp_path / "by-id")
    assert by_id.exit_code == 0, by_id.output
    alone = _run("merge", views["failing"].id, job, "--model", tiny_model, "--out", tmp_path / "no")
    assert (alone.exit_code, "error adapter_mismatch" in alone.stderr) == (5, True)
