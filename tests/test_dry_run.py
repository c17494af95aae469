"""The plan by a dry run: it has the bytes of the real model and the real work, takes no memory, and agrees with the closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from edge_agent.job import Dataset, Job, Lora, Schedule, SftOptions
from edge_agent.training.methods import METHODS
from edge_agent.training.rehearsal import Rehearsal
from profiles.device import device_profile
from quantization.adapter import attach_adapter
from quantization.dry_run import counted, ghost_model, takes_trees
from quantization.estimate import Lengths
from quantization.ladder import Rows, Rung
from quantization.load import load_model
from quantization.model_files import find_model
from quantization.shape import read_shape

CPU = device_profile("cpu")


def _rehearsal(model: Path, tokens: int = 300, layout_padded: bool = False) -> Rehearsal:
    files = find_model(str(model))
    rows = Rows((tokens,) * 8, (60,) * 8, 100)
    lengths = Lengths(rows, Rows((tokens,) * 16, (60,) * 16, 100), (200, 40))
    job = Job(model=str(model), dataset=Dataset("0" * 64), budget_bytes=2**40, method=SftOptions(), schedule=Schedule(batch=8))
    return Rehearsal(files, read_shape(files), job, lengths, CPU, METHODS[SftOptions](SftOptions()), layout_padded)


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


def test_offloaded_checkpoints_take_nothing_on_the_device(tiny_model: Path) -> None:
    """Rung 7 takes less by the inputs of all layers but the first, whose the decoder holds, and the last, which is at work."""
    rehearsal = _rehearsal(tiny_model)
    rehearsal.device = device_profile("cuda")
    kept, offloaded = (
        {s.name: s.transient_bytes for s in rehearsal.stages(Rung(7, 8, checkpointing=True, offload_checkpoints=offloads), 8)}
        for offloads in (False, True)
    )
    tokens, shape = rehearsal.lengths.train.computed(8), rehearsal.shape
    saved = kept["train: forward"] - offloaded["train: forward"]
    assert saved == pytest.approx((shape.layers - 2) * tokens * shape.hidden * 2, rel=0.05)
    assert offloaded["train: backward"] < kept["train: backward"]
    assert {name for name in kept if kept[name] != offloaded[name]} == {"train: forward", "train: backward"}


def test_few_layers_stand_for_all(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found with two layers and three is what a run of all layers finds, on every stage, with and without checkpointing."""
    for rung in (Rung(0, 8), Rung(3, 2, 32, checkpointing=True)):
        few = _rehearsal(tiny_model).stages(rung, 8)
        with monkeypatch.context() as patched:
            patched.setattr("edge_agent.training.rehearsal.FEW_LAYERS", 4)
            whole = _rehearsal(tiny_model).stages(rung, 8)
        for a, b in zip(few, whole, strict=True):
            assert a.peak_bytes - CPU.overhead_bytes == pytest.approx(b.peak_bytes - CPU.overhead_bytes, rel=0.01), a.name


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


def test_dry_run_and_closed_form_agree(tiny_model: Path) -> None:
    """They differ by less than what the choice of a rung tolerates, so no rung that fits is passed over."""
    rehearsal = _rehearsal(tiny_model, tokens=600)
    for rung in (Rung(0, 8), Rung(1, 2), Rung(3, 8, checkpointing=True)):
        guessed = max(s.peak_bytes for s in rehearsal._guess_of(1.0)(rung, 8) if s.stage == "train")
        assert guessed < 1.2 * _peak(rehearsal, rung)


def test_plan_names_the_fastest_rung_that_fits(tiny_model: Path) -> None:
    """A budget below what is asked takes another rung; the survey names a budget that works, and what every rung saves."""
    rehearsal = _rehearsal(tiny_model)
    asked = max(s.peak_bytes for s in rehearsal.stages(Rung(0, 8), 64))
    rehearsal.job = Job(model="m", dataset=Dataset("0" * 64), budget_bytes=asked - 2**20, method=SftOptions(), schedule=Schedule(batch=8))
    survey = rehearsal.survey()
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
