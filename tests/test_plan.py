"""The plan of bytes: the ladder, its refusals, and its promise against measured peaks."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_agent.errors import DoesNotFit
from edge_agent.job import Dataset, Job, Lora, ReftOptions, Schedule, SftOptions
from profiles.device import device_profile
from quantization.model_files import Tensor
from quantization.plan import Lengths, Rung, Shape, adapter_elements, ladder, make_plan, stage_plans

LENGTHS = Lengths(train=1024, score=1400, answer=256, generate=900, repair=1400, judge=1200)


def _job(budget_bytes: int) -> Job:
    return Job(model="m", dataset=Dataset("0" * 64), budget_bytes=budget_bytes)


def _llama_8b() -> Shape:
    """Llama-3-8B from its published sizes."""
    sizes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)} | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), (14336, 4096)
    )
    linear = tuple(Tensor(f"{i}.{n}", s, 2 * s[0] * s[1]) for i in range(32) for n, s in sizes.items())
    return Shape(4096, 14336, 4096, 1024, 32, 128256, linear, 2 * 128256 * 4096, 128256 * 4096, 2 * 8_030_000_000)


def test_resident_bytes_match_published_arithmetic() -> None:
    """Llama-3-8B: 3,434 MiB of NF4 and 2,004 MiB of embedding and head, rank 16 on the MLP with 28.3 million parameters."""
    shape = _llama_8b()
    job = msgspec.structs.replace(_job(2**40), lora=Lora(targets="mlp"))
    assert adapter_elements(shape, job.lora) == pytest.approx(28.3e6, rel=0.01)
    device = msgspec.structs.replace(device_profile("cuda"), overhead_bytes=0, reserve_bytes=0)
    load = stage_plans(shape, job, LENGTHS, device, next(ladder(job)), 1)[0]
    assert load.resident_bytes / 2**20 == pytest.approx(3433.9 + 2004.0, rel=0.01)


def test_a_smaller_budget_takes_a_lower_rung() -> None:
    """From plenty to the floor the chosen rung goes down the ladder and never over the budget; below it the job is refused."""
    shape, device = _llama_8b(), device_profile("cuda")
    rungs = []
    for gib in (160, 80, 40, 24, 16, 12, 10, 9):
        plan = make_plan(shape, _job(gib * 2**30), LENGTHS, device)
        assert plan.peak_bytes <= gib * 2**30
        rungs.append((plan.checkpointing, -plan.micro_batch))
    assert rungs == sorted(rungs)
    assert rungs[0] == (False, -8)
    assert rungs[-1] == (True, -1)
    with pytest.raises(DoesNotFit):
        make_plan(shape, _job(4 * 2**30), LENGTHS, device)


def test_reft_is_planned_with_its_sampling() -> None:
    """Its train stage counts one more copy of the adapter and the generation; no other stage changes."""
    shape, device = _llama_8b(), device_profile("cuda")
    job = msgspec.structs.replace(_job(2**40), schedule=Schedule(batch=64))
    rung = Rung("test", 1, 32, True)
    plain, reft = (
        {s.stage: s for s in stage_plans(shape, msgspec.structs.replace(job, method=m), LENGTHS, device, rung, 64)}
        for m in (SftOptions(), ReftOptions())
    )
    assert {name for name in plain if plain[name] != reft[name]} == {"train"}
    assert reft["train"].resident_bytes - plain["train"].resident_bytes == adapter_elements(shape, job.lora) * 4
    assert reft["train"].transient_bytes == reft["evaluate"].transient_bytes > plain["train"].transient_bytes


def test_refusal_names_a_budget_that_works() -> None:
    """The smallest budget that the error names is accepted, and one MiB less is not."""
    shape, device = _llama_8b(), device_profile("cuda")
    with pytest.raises(DoesNotFit) as refused:
        make_plan(shape, _job(2**30), LENGTHS, device)
    enough = refused.value.needs_bytes
    assert make_plan(shape, _job(enough), LENGTHS, device).peak_bytes == enough
    with pytest.raises(DoesNotFit, match=r"the longest record that fits has [1-9]"):
        make_plan(shape, _job(enough - 2**20), LENGTHS, device)


def test_tiny_model_has_the_sizes_of_its_files(tiny_model: Path) -> None:
    """The shape comes from config.json and the headers of the weight files."""
    from quantization.model_files import find_model
    from quantization.plan import read_shape

    shape = read_shape(find_model(str(tiny_model)))
    assert (shape.hidden, shape.mlp, shape.query, shape.key, shape.layers) == (192, 512, 192, 96, 4)
    assert len(shape.linear) == 4 * 7
