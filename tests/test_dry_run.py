"""The plan by a dry run: it has the bytes of the real model and the real work, takes no memory, and agrees with the closed form."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from edge_agent.errors import DeviceTooSmall, ModelMissing, ModelUnsafe
from edge_agent.job import Dataset, Evaluation, Job, Lora, ReftOptions, Schedule, SftOptions
from edge_agent.training.methods import METHODS
from edge_agent.training.optimizer import make_optimizer
from edge_agent.training.prepare import prepare_files
from edge_agent.training.rehearsal import Rehearsal
from edge_agent.training.rehearsal import _generate as rehearse_generation
from profiles.device import DeviceProfile, device_profile
from quantization.adapter import attach_adapter
from quantization.dry_run import counted, ghost_model, takes_trees
from quantization.estimate import MARGIN, Lengths
from quantization.ladder import Rows, Rung
from quantization.load import load_model
from quantization.model_files import find_model
from quantization.nf4 import KERNEL_VARIABLE
from quantization.plan import Plan, Survey
from quantization.shape import read_shape
from tests.tiny_training import judged_records

CPU, SFT = device_profile("cpu"), SftOptions()
STAGES = ("evaluate", "sample", "score", "train", "save")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 500,
}  # fmt: skip


def _rehearsal(
    model: Path, tokens: int = 300, layout_padded: bool = False, asked: int = 0, device: DeviceProfile = CPU, options: Any = SFT,
) -> Rehearsal:  # fmt: skip
    files = find_model(str(model))
    rows = Rows((tokens,) * 8, (60,) * 8, 100)
    lengths = Lengths(rows, Rows((tokens,) * 16, (60,) * 16, 100), (200, 40), asked=asked)
    job = Job(model=str(model), dataset=Dataset("0" * 64), budget_bytes=2**40, method=options, schedule=Schedule(batch=8))
    return Rehearsal(files, read_shape(files), job, lengths, device, METHODS[type(options)](options), layout_padded)


def _written(directory: Path, config: PreTrainedConfig) -> Path:
    """Write a model of random weights."""
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def _peak(rehearsal: Rehearsal, rung: Rung, stage: str = "train") -> int:
    return max(s.peak_bytes for s in rehearsal.stages(rung, 8) if s.stage == stage)


def test_ghost_has_the_bytes_of_the_loaded_model(tiny_model: Path) -> None:
    """What the ghost holds, scales and vocabulary included, is what the loaded model holds, to the rounding of its blocks."""
    files = find_model(str(tiny_model))
    for quantized in (False, True):
        model = load_model(files, CPU, quantized_head=quantized)
        real = {}
        for module in model.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                state = getattr(tensor, "quant_state", None)
                parts = (tensor, state.absmax, state.code, state.state2.absmax, state.state2.code) if state else (tensor,)
                real |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        ghost = ghost_model(AutoConfig.from_pretrained(tiny_model), CPU, quantized_head=quantized)
        with counted(ghost, CPU, all_nonzero=False) as live:
            assert live.now_bytes == pytest.approx(sum(real.values()), rel=0.05)


def test_count_sees_what_is_made_and_what_is_freed(tiny_model: Path) -> None:
    """A tensor counts once however many views it has, and no longer when it is gone; the peak of a part remains."""
    ghost = ghost_model(AutoConfig.from_pretrained(tiny_model), CPU)
    with counted(ghost, CPU, all_nonzero=False) as live:
        before = live.now_bytes
        live.begin("work")
        tensor = torch.zeros(1024, 1024)
        views = tensor[1:], tensor.t()
        assert live.now_bytes - before == pytest.approx(4 * 2**20, rel=0.01)
        del tensor, views
        assert live.now_bytes == before
        assert live.peaks["work"] - before == pytest.approx(4 * 2**20, rel=0.01)


def test_holes_of_the_heap_stay_until_they_are_filled(tiny_model: Path) -> None:
    """Small blocks that are freed count on, later ones take their place, and `trim` gives them back."""
    ghost = ghost_model(AutoConfig.from_pretrained(tiny_model), CPU)
    with counted(ghost, CPU, all_nonzero=False) as live:
        before = live.now_bytes
        small = [torch.zeros(64 * 1024) for _ in range(8)]  # 256 KiB each
        taken = live.now_bytes - before
        assert taken == pytest.approx(2 * 2**20, rel=0.01)
        small.clear()
        assert live.now_bytes - before == taken
        small = [torch.zeros(64 * 1024) for _ in range(4)]
        assert live.now_bytes - before == taken
        live.trim()
        assert live.now_bytes - before == pytest.approx(taken / 2)


@pytest.mark.slow
def test_offloaded_checkpoints_take_nothing_on_the_device(tiny_model: Path) -> None:
    """Rung 7 takes less by the inputs of all layers but the first, whose the decoder holds, and the one at work.

    That is the next to last: the last one takes less, because it skips most of the prompts.
    """
    rehearsal = _rehearsal(tiny_model)
    rehearsal.device = device_profile("cuda")
    kept, offloaded = (
        {s.name: s.transient_bytes for s in rehearsal.stages(Rung(7, 8, checkpointing=True, offload_checkpoints=offloads), 8)}
        for offloads in (False, True)
    )
    tokens, shape = rehearsal.lengths.train.computed(8), rehearsal.shape
    saved = kept["train: forward"] - offloaded["train: forward"]
    assert saved == pytest.approx((shape.layers - 3) * tokens * shape.hidden * 2, rel=0.05)
    assert offloaded["train: backward"] < kept["train: backward"]
    assert {name for name in kept if kept[name] != offloaded[name]} == {"train: forward", "train: backward"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "rung"),
    [
        ("cpu", Rung(0, 8)), ("cpu", Rung(3, 2, 32, checkpointing=True)),
        ("cuda", Rung(7, 8, checkpointing=True, adam_8bit=True, offload_checkpoints=True)),
    ],
)  # fmt: skip
def test_few_layers_stand_for_all(profile: str, rung: Rung, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found with two layers and three is what a run of all eight finds, on every stage, and not less."""
    device, model = (
        device_profile(profile),
        _written(tmp_path / "deep", LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8})),
    )
    few = _rehearsal(model, device=device).stages(rung, 8)
    monkeypatch.setattr("edge_agent.training.rehearsal.FEW_LAYERS", 8)
    whole = _rehearsal(model, device=device).stages(rung, 8)
    for a, b in zip(few, whole, strict=True):
        found, counted_bytes = (s.peak_bytes - device.overhead_bytes for s in (a, b))
        assert 0.995 <= found / counted_bytes <= 1.01, a.name


@pytest.mark.slow
def test_every_rung_saves_bytes(tiny_model: Path) -> None:
    """Smaller micro-batches and checkpointing take less than what was asked, and padded rows take more than shared ones.

    The output head of so small a model is no peak, so its chunks save nothing here.
    """
    rehearsal = _rehearsal(tiny_model)
    rungs = (Rung(0, 8), Rung(1, 4), Rung(1, 1), Rung(3, 1, 32, checkpointing=True))
    peaks = [_peak(rehearsal, rung) for rung in rungs]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert _peak(rehearsal, Rung(2, 1, 32)) <= peaks[2]
    assert _peak(_rehearsal(tiny_model, layout_padded=True), Rung(0, 8)) > peaks[0]


@pytest.mark.parametrize(
    ("profile", "asked", "options"),
    [
        ("cpu", 0, SFT), pytest.param("cpu", 150, ReftOptions(), marks=pytest.mark.slow),
        pytest.param("cuda", 150, SFT, marks=pytest.mark.slow), ("cuda", 0, ReftOptions()),
    ],
)  # fmt: skip
def test_dry_run_and_closed_form_agree(profile: str, asked: int, options: Any, tiny_model: Path) -> None:
    """Without the device's overhead no stage differs by more than the choice of a rung tolerates: none that fits is passed over."""
    device = device_profile(profile)
    rehearsal = _rehearsal(tiny_model, tokens=600, asked=asked, device=device, options=options)
    for rung in (Rung(0, 8), Rung(1, 2), Rung(3, 8, checkpointing=True)):
        guessed, counted_bytes = (
            {stage: max(s.peak_bytes for s in stages if s.stage == stage) - device.overhead_bytes for stage in STAGES}
            for stages in (rehearsal._guess_of(1.0)(rung, 8), rehearsal.stages(rung, 8))
        )
        for stage in STAGES:
            assert 0.75 < guessed[stage] / counted_bytes[stage] < 1.1, (rung, stage)


@pytest.mark.slow
def test_reft_is_planned_with_the_loss_of_its_updates(tiny_model: Path) -> None:
    """PPO forms the gradient of log-probabilities in 32 bits, which takes more of the output head than a weighted loss."""
    device, rung = device_profile("cuda"), Rung(3, 8, checkpointing=True)
    plain, reft = (
        {s.name: s for s in _rehearsal(tiny_model, device=device, options=options).stages(rung, 64)} for options in (SFT, ReftOptions())
    )
    assert reft["train: backward"].transient_bytes > plain["train: backward"].transient_bytes
    assert reft["train: sample"].transient_bytes < 0.2 * reft["sample"].transient_bytes
    assert reft["evaluate"].resident_bytes > plain["evaluate"].resident_bytes


@pytest.mark.slow
def test_batch_beyond_a_window_is_planned_whole(tmp_path: Path) -> None:
    """Where the window is shorter than prompt and answer the beginning is not read alone, in the plan as in the generation."""
    models = {window: _written(tmp_path / str(window), MistralConfig(**SIZES, sliding_window=window)) for window in (64, 240)}
    transient = {
        (window, asked): next(s.transient_bytes for s in _rehearsal(model, asked=asked).stages(Rung(0, 8), 8) if s.stage == "sample")
        for window, model in models.items() for asked in (0, 150)
    }  # fmt: skip
    assert transient[64, 150] == transient[64, 0]
    assert transient[240, 150] < 0.7 * transient[240, 0]


def test_layers_whose_kinds_never_repeat_are_run_whole(tmp_path: Path) -> None:
    """Three layers that see everything and three with a window: the first ones do not stand for the others."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=32, layer_types=kinds)
    rehearsal = _rehearsal(_written(tmp_path, config))
    sample = next(s for s in rehearsal.stages(Rung(0, 8), 8) if s.stage == "sample")
    whole = rehearsal._count(None, Rung(0, 8), partial(rehearse_generation, batch=8, prompt=200, new=40, asked=0))
    assert sample.transient_bytes == int(MARGIN * (max(whole.values()) - whole["held"]))


def test_update_is_made_tensor_by_tensor() -> None:
    """All at once, as PyTorch does by itself on CUDA, it would take one more adapter than was planned."""
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(4))], Schedule(), eight_bit=False)
    assert optimizer.defaults["foreach"] is False
    assert not optimizer.defaults["fused"]


def test_head_in_slices_takes_what_all_of_its_slices_take(tiny_model: Path) -> None:
    """The dry run uses the first two slices and the last; the bytes are those of a run with all of them."""
    wide = AutoConfig.from_pretrained(tiny_model)
    wide.vocab_size = 27_500  # the last slice is a block of the heap
    for quantized in (False, True):
        peaks = []
        for whole in (False, True):
            ghost = ghost_model(wide, CPU, 1, quantized_head=quantized)
            head = ghost.get_output_embeddings()
            if whole:
                del head.slices
            with counted(ghost, CPU, all_nonzero=False) as live:
                live.begin("forward")
                logits_NV = head(torch.zeros(200, wide.hidden_size, requires_grad=True))
                live.begin("backward")
                logits_NV.sum().backward()
            peaks.append(live.peaks)
        assert peaks[0] == peaks[1]


@pytest.mark.slow
def test_plan_of_a_device_that_is_too_small_names_the_budget_to_give(tiny_model: Path) -> None:
    """A budget over the device's memory is refused where the plan needs it; with the one that is named other settings are chosen."""
    device = device_profile("rtx-4060-8gb")

    def survey(budget_bytes: int) -> Survey:
        job = Job(
            model=str(tiny_model), dataset=Dataset("0" * 64), budget_bytes=budget_bytes, method=SFT,
            evaluation=Evaluation(batch=12_000, questions=2),
        )  # fmt: skip
        return prepare_files(job, judged_records(6), None, device).survey()

    with pytest.raises(DeviceTooSmall, match=r"RTX 4060 8 GB has 8,192 MiB, of which 256 MiB .* give --budget 7936MiB"):
        survey(64 * 2**30)
    plan = survey(7936 * 2**20).plan
    assert plan.peak_bytes <= 7936 * 2**20
    assert plan.generate_batch < 12_000


def test_plan_needs_no_weights(tiny_model: Path, tmp_path: Path) -> None:
    """Configuration and tokenizer say what the weights would, while these are not there, or not all of them; a run needs them."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))

    def plan(model: Path, *, weights: bool) -> Plan:
        job = Job(model=str(model), dataset=Dataset("0" * 64), budget_bytes=2**30, method=SFT, evaluation=Evaluation(questions=2))
        return prepare_files(job, judged_records(6), None, CPU, weights=weights).survey().plan

    wanted = plan(tiny_model, weights=True)
    for _ in range(2):
        found = plan(bare, weights=False)
        assert (found.rung, found.micro_batch) == (wanted.rung, wanted.micro_batch)
        assert found.peak_bytes == pytest.approx(wanted.peak_bytes, rel=0.005)
        (bare / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelMissing):
        plan(bare, weights=True)
    (bare / "model.safetensors.index.json").unlink()
    (bare / "pytorch_model.bin").touch()
    with pytest.raises(ModelUnsafe):
        plan(bare, weights=False)


@pytest.mark.slow
@pytest.mark.parametrize("budget_bytes", [2**30, 2**32])
def test_plan_shows_what_a_run_would_do(tiny_model: Path, budget_bytes: int) -> None:
    """The plan of `edge-agent plan` is the one that a run begins with, whether or not there is room to keep what is freed."""
    job = Job(model=str(tiny_model), dataset=Dataset("0" * 64), budget_bytes=budget_bytes, method=SFT, evaluation=Evaluation(questions=2))
    work = prepare_files(job, judged_records(6), None, CPU)
    plan = work.survey().plan
    assert plan == work.plan()
    assert plan.keeps_freed == (plan.roomy_bytes <= budget_bytes)


@pytest.mark.slow
def test_a_plan_after_another_rehearses_what_is_new(tiny_model: Path) -> None:
    """The same one nothing, one on a lower rung only that; each run is told to who may stop it."""
    job = Job(model=str(tiny_model), dataset=Dataset("0" * 64), budget_bytes=2**30, method=SFT, evaluation=Evaluation(questions=2))
    work, runs = prepare_files(job, judged_records(6), None, CPU), []
    first = work.plan(on_run=lambda: runs.append("first"))
    assert work.plan(on_run=lambda: runs.append("same")) == first
    missed = max(stage.peak_bytes for stage in first.stages if stage.stage == "train")
    lower = work.plan(missed={"train": missed}, on_run=lambda: runs.append("lower"))
    assert lower.micro_batch < first.micro_batch or lower.number > first.number
    assert set(runs) == {"first", "lower"}
    known = len(runs)
    assert prepare_files(job, judged_records(6), None, CPU).plan(missed={"train": missed}, on_run=lambda: runs.append("anew")) == lower
    assert len(runs) - known == known


def test_plan_for_plain_torch_has_no_moments_in_8_bits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their optimizer is of bitsandbytes: where its kernels do not run, as from a wheel on a Jetson, a run must not choose it."""
    job = Job(model=str(tiny_model), dataset=Dataset("0" * 64), budget_bytes=2**30, method=SFT, evaluation=Evaluation(questions=2))
    for kernel, has_8bit in (("bitsandbytes", True), ("torch", False)):
        monkeypatch.setenv(KERNEL_VARIABLE, kernel)
        work = prepare_files(job, judged_records(6), None, CPU)
        assert work.kernel == kernel
        assert any(rung.adam_8bit for rung in work.rehearsal().rungs) == has_8bit


@pytest.mark.slow
def test_plan_names_the_fastest_rung_that_fits(tiny_model: Path) -> None:
    """A budget below what is asked takes another rung; the survey names a budget that works, and what every rung saves."""
    rehearsal = _rehearsal(tiny_model)
    asked = max(s.peak_bytes for s in rehearsal.stages(Rung(0, 8), 64))
    rehearsal.job = Job(model="m", dataset=Dataset("0" * 64), budget_bytes=asked - 2**20, method=SftOptions(), schedule=Schedule(batch=8))
    survey = rehearsal.survey(rehearsal.plan())
    assert survey.plan.peak_bytes <= asked - 2**20
    assert survey.plan.rung != "as asked" or survey.plan.generate_batch < 64
    assert survey.smallest_budget_bytes <= survey.plan.budget_bytes
    assert [r.number for r in survey.rungs] == list(range(6))
    assert survey.rungs[0].relative_time == 1


@pytest.mark.parametrize(("family", "takes"), [("llama", True), ("qwen2", True), ("gemma2", True), ("phi", True), ("mamba", False)])
def test_architecture_says_whether_it_reads_trees(family: str, takes: bool) -> None:
    """Attention that transformers lets one replace reads trees; a state-space model does not."""
    assert takes_trees(AutoConfig.for_model(family)) is takes


def test_adapter_of_a_ghost_is_that_of_the_job(tiny_model: Path) -> None:
    """The same code attaches it, so it has the parameters that the closed form counts."""
    from quantization.shape import adapter_elements

    ghost = ghost_model(AutoConfig.from_pretrained(tiny_model), CPU)
    with torch.device("meta"):
        ghost = attach_adapter(ghost, Lora(), 0, "tiny")
    trained = sum(p.numel() for p in ghost.parameters() if p.requires_grad)
    assert trained == adapter_elements(read_shape(find_model(str(tiny_model))), Lora())
