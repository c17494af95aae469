"""The plan in closed form: sizes from configurations, the ladder and its order, refusals, calibration."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.errors import DoesNotFit, ModelUnsupported
from edge_agent.job import Dataset, Job, Lora, ReftOptions, Schedule
from profiles.calibration import KEPT, calibrated, learn
from profiles.device import DeviceProfile, device_profile
from quantization.estimate import MARGIN, NF4_BYTES, Lengths, estimate, make_estimate
from quantization.ladder import Layout, Rows, Rung, ladder, relative_time
from quantization.model_files import ModelFiles, find_model
from quantization.shape import Shape, adapter_elements, read_shape

LENGTHS = Lengths(
    Rows((1023,) * 8, (256,) * 8, 500), Rows((1399,) * 16, (256,) * 16, 500), (644, 256), repair=(1144, 256), judge=(1072, 128)
)
MIB, GIB = 2**20, 2**30
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_HALF_B = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_1B = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500}
GROUPED = SMALL | {"num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "mistral": GROUPED, "smollm3": GROUPED | TOKENS, "qwen2": GROUPED | {"tie_word_embeddings": True}, "qwen3": GROUPED,
    "gemma": GROUPED, "gemma2": GROUPED | {"head_dim": 32}, "gemma3_text": GROUPED, "phi": SMALL,
    "phi3": GROUPED | TOKENS,
}  # fmt: skip


def _shape(config: dict[str, Any]) -> Shape:
    return read_shape(ModelFiles("m", Path("m"), config, (), ""))


def _job(budget_bytes: int) -> Job:
    return Job(model="m", dataset=Dataset("0" * 64), budget_bytes=budget_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_from_a_configuration_are_those_of_the_model(family: str) -> None:
    """Without weight files every family has the parameters of transformers' own model: those in NF4, all others, embeddings tied or not."""
    torch = pytest.importorskip("torch", reason="the sizes are held against transformers' own models")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    shape = _shape(config.to_dict())
    assert shape.linear_elements == linear
    assert shape.other_elements == sum(p.numel() for p in model.parameters()) - linear
    assert shape.tied == bool(model.all_tied_weights_keys)


def test_sizes_of_an_unknown_family_need_its_weight_files() -> None:
    """Without weight files a configuration of another family is refused by name."""
    with pytest.raises(ModelUnsupported, match="'mamba' are not known without them"):
        _shape(LLAMA_8B | {"model_type": "mamba"})


@pytest.mark.parametrize(
    ("config", "linear", "tables", "adapter", "checkpoints", "matrix"),
    [
        (LLAMA_8B, 3433.9, 2004.0, 162.8, 256.0, 112.0),
        (LLAMA_1B, 478.8, 501.0, 45.2, 64.0, 32.0),
        (QWEN_HALF_B, 176.2, 259.7, 38.3, 42.0, 8.3),
        (QWEN_1B, 644.8, 445.1, 81.1, 84.0, 26.3),
    ],
)
def test_arithmetic_matches_the_published_floor(
    config: dict[str, Any], linear: float, tables: float, adapter: float, checkpoints: float, matrix: float
) -> None:
    """The parts of the floor, in MiB: NF4, vocabulary, adapter of rank 16 on the MLP at 6 bytes, checkpoints, one matrix in bf16."""
    shape = _shape(config)
    elements = adapter_elements(shape, Lora(targets="mlp"))
    found = (
        shape.linear_elements * NF4_BYTES, shape.vocabulary * shape.hidden * 2 * (1 if shape.tied else 2), elements * 6,
        shape.layers * 1024 * shape.hidden * 2, shape.largest_linear * 2,
    )  # fmt: skip
    assert [part / MIB for part in found] == pytest.approx([linear, tables, adapter, checkpoints, matrix], rel=0.03)


def test_a_smaller_budget_takes_a_lower_rung() -> None:
    """From plenty to the floor the peak stays under the budget and the rungs take more time; below the floor the job is refused."""
    shape, device = _shape(LLAMA_8B), device_profile("cuda")
    order = ladder(_job(GIB), shape, LENGTHS.train, device)
    places = []
    for gib in (160, 80, 40, 24, 16, 12, 10, 8, 7):
        plan = make_estimate(shape, _job(gib * GIB), LENGTHS, device)
        assert plan.peak_bytes <= gib * GIB
        places.append(next(i for i, rung in enumerate(order) if (rung.number, rung.name) == (plan.number, plan.rung)))
    assert places == sorted(places)
    assert places[0] == 0
    assert order[places[-1]].number >= 4
    with pytest.raises(DoesNotFit):
        make_estimate(shape, _job(3 * GIB), LENGTHS, device)


def test_checkpointing_comes_before_a_micro_batch_that_loses_the_common_beginning() -> None:
    """A long instruction is computed once for a pack: eight rows with checkpointing are faster than one row without."""
    shape, job = _shape(LLAMA_8B), _job(GIB)
    shared = Rows((700,) * 8, (100,) * 8, 600)
    order = ladder(job, shape, shared, device_profile("cuda"))
    assert order.index(Rung(3, 8, checkpointing=True)) < order.index(Rung(1, 1))
    alone = Rows((700,) * 8, (100,) * 8, 0)
    order = ladder(job, shape, alone, device_profile("cuda"))
    assert order.index(Rung(1, 1)) < order.index(Rung(3, 8, checkpointing=True))


def test_rungs_that_quantise_come_last_and_within_a_kind_the_fastest_first() -> None:
    """No rung that changes results precedes one that does not, and times never fall from one rung to the next of its kind."""
    shape, device = _shape(LLAMA_8B), device_profile("cuda")
    order = ladder(_job(GIB), shape, LENGTHS.train, device)
    kinds = [max(rung.number, 3) for rung in order]
    assert kinds == sorted(kinds)
    for kind in set(kinds):
        times = [relative_time(shape, LENGTHS.train, rung) for rung in order if max(rung.number, 3) == kind]
        assert times == sorted(times)
    assert {rung.number for rung in order} == set(range(8))
    on_cpu = ladder(_job(GIB), _shape(QWEN_1B), LENGTHS.train, device_profile("cpu"))
    assert {rung.number for rung in on_cpu} == set(range(6))


def test_rungs_do_without_an_optimizer_that_is_not_there() -> None:
    """Where bitsandbytes' kernels do not run there are no moments in 8 bits: the rungs above are there, in the same order, without them."""
    shape, device = _shape(LLAMA_8B), device_profile("jetson-orin-nano-8gb")
    with_8bit, without = (ladder(_job(GIB), shape, LENGTHS.train, device, has_8bit=has) for has in (True, False))
    assert {rung.number for rung in without} == {0, 1, 2, 3, 5, 6}
    assert without == [replace(rung, adam_8bit=False) for rung in with_8bit if rung.number != 4]


def test_an_evaluation_that_does_not_fit_leaves_the_training_alone() -> None:
    """Where only generation is too large, fewer prompts are generated at once, and the rung stays."""
    shape, device = _shape(LLAMA_8B), device_profile("cuda")
    roomy = make_estimate(shape, _job(160 * GIB), LENGTHS, device)
    long = Lengths(LENGTHS.train, LENGTHS.score, (30_000, 256))
    plan = make_estimate(shape, _job(80 * GIB), long, device)
    assert plan.generate_batch < roomy.generate_batch
    assert plan.rung == roomy.rung == "as asked"


def _reft(budget_bytes: int, batch: int) -> Job:
    return msgspec.structs.replace(_job(budget_bytes), method=ReftOptions(), schedule=Schedule(batch=batch))


def test_reft_is_planned_with_its_sampling() -> None:
    """Training holds one more copy of the adapter and a value head, which stay to the end, and samples as many answers as a step has."""
    shape, device, rung = _shape(LLAMA_8B), device_profile("cuda"), Rung(3, 1, 32, checkpointing=True)
    plain, small, large = (
        {s.name: s for s in estimate(shape, job, LENGTHS, device, rung, 64, "shared")}
        for job in (_job(2**40), _reft(2**40, 8), _reft(2**40, 64))
    )
    held = {name: small[name].resident_bytes - plain[name].resident_bytes for name in plain}
    kept_bytes = MARGIN * 4 * (adapter_elements(shape, Lora()) + 3 * (shape.hidden + 1))
    assert {name for name in held if held[name]} == {"evaluate", "train", "train: score", "train: checkpoint", "save"}
    assert all(found == pytest.approx(kept_bytes, abs=2) for found in held.values() if found)
    assert large["train: sample"].transient_bytes == large["evaluate"].transient_bytes
    assert small["train: sample"].transient_bytes == pytest.approx(small["evaluate"].transient_bytes / 8, abs=2)


def test_reft_whose_sampling_does_not_fit_samples_fewer_at_once() -> None:
    """Sampling beside the optimizer's moments never changes the training: fewer questions are answered at once."""
    shape, device = _shape(LLAMA_8B), device_profile("cuda")
    long = Lengths(LENGTHS.train, LENGTHS.score, (30_000, 256))
    stages = {s.name: s for s in estimate(shape, _reft(2**40, 8), long, device, Rung(0, 8), 8, "shared")}
    budget_bytes = stages["train: sample"].peak_bytes - 1
    assert max(s.peak_bytes for s in stages.values() if not s.generates) < budget_bytes
    plan = make_estimate(shape, _reft(budget_bytes, 8), long, device)
    assert (plan.rung, plan.generate_batch) == ("as asked", 4)


def test_common_beginning_of_prompts_is_counted_once() -> None:
    """What all prompts begin with is read in one row; rows that are padded read it each, and so does a single one."""
    shape, device, rung = _shape(QWEN_HALF_B), device_profile("cpu"), Rung(3, 1, 32, checkpointing=True)
    alike = replace(LENGTHS, generate=(3000, 64), asked=2900)
    apart = replace(alike, asked=0)

    def evaluation(lengths: Lengths, batch: int, layout: Layout) -> int:
        return next(s.transient_bytes for s in estimate(shape, _job(GIB), lengths, device, rung, batch, layout) if s.stage == "evaluate")

    assert evaluation(alike, 8, "shared") < 0.7 * evaluation(apart, 8, "shared")
    assert evaluation(alike, 8, "padded") == evaluation(apart, 8, "padded")
    assert evaluation(alike, 1, "shared") == evaluation(apart, 1, "shared")


def test_samples_of_a_large_dataset_are_planned() -> None:
    """They are held on the host while the adapter is, so a budget of the host has room for their token ids, and that of a card not."""
    rung, large = Rung(3, 1, 32, checkpointing=True), replace(LENGTHS, held=50_000_000)
    for name, bytes_each in (("cpu", 8), ("jetson-orin-nx-16gb", 8), ("cuda", 0)):
        some, many = (
            {s.name: s.resident_bytes for s in estimate(_shape(QWEN_HALF_B), _job(GIB), lengths, device_profile(name), rung, 8, "shared")}
            for lengths in (LENGTHS, large)
        )
        more = {stage: many[stage] - some[stage] for stage in some}
        assert more["load"] == more["sample"] == 0
        for stage in ("evaluate", "score", "train", "save"):
            assert more[stage] == pytest.approx(MARGIN * bytes_each * large.held, abs=1)


def test_longest_record_that_fits_is_right_where_generation_binds() -> None:
    """Shorter records leave what is generated as long as it was: those of the length that the refusal names fit, longer ones do not."""
    shape, device = _shape(LLAMA_1B), device_profile("cuda")
    rows = Rows((1000,), (20,))
    asked = Lengths(rows, rows, (100_000, 40_000))
    job = msgspec.structs.replace(_job(5 * GIB), schedule=Schedule(batch=1))
    with pytest.raises(DoesNotFit, match=r"stage (evaluate|sample)") as refused:
        make_estimate(shape, job, asked, device)
    [longest] = map(int, re.findall(r"record that fits has (\d+) tokens", str(refused.value)))
    assert 0 < longest < 1000
    assert asked.shortened(longest / 1000).generate[1] == 40_000
    make_estimate(shape, job, asked.shortened(longest / 1000), device)
    with pytest.raises(DoesNotFit):
        make_estimate(shape, job, asked.shortened((longest + 4) / 1000), device)


def test_refusal_names_a_budget_that_works() -> None:
    """The smallest budget that the error names is accepted, and one MiB less is not."""
    shape, device = _shape(LLAMA_8B), device_profile("cuda")
    with pytest.raises(DoesNotFit) as refused:
        make_estimate(shape, _job(GIB), LENGTHS, device)
    enough = refused.value.needs_bytes
    assert make_estimate(shape, _job(enough), LENGTHS, device).peak_bytes == enough
    with pytest.raises(DoesNotFit, match=r"the longest record that fits has [1-9]"):
        make_estimate(shape, _job(enough - MIB), LENGTHS, device)


def test_tiny_model_has_the_sizes_of_its_files(tiny_model: Path) -> None:
    """The shape comes from config.json and the headers of the weight files, and is the one that the configuration alone gives."""
    files = find_model(str(tiny_model))
    shape = read_shape(files)
    assert (shape.hidden, shape.mlp, shape.query, shape.key, shape.layers) == (192, 512, 192, 96, 4)
    assert len(shape.linear) == 4 * 7
    declared = _shape(files.config)
    assert (declared.linear_elements, declared.other_elements) == (shape.linear_elements, shape.other_elements)


def test_calibration_takes_the_middle_of_the_last_jobs(tmp_path: Path) -> None:
    """A stage takes the median of what finished jobs have shown, of this device only, and never far from what is declared.

    How far they were apart stays free beside every plan; no odd job counts.
    """
    file, device, other = tmp_path / "state" / "calibration.json", device_profile("cpu"), device_profile("cuda")
    assert calibrated(device, file) == device
    for beyond_bytes in (510_000_000, 500_000_000, 490_000_000, 2**50):
        learn(device, {"load": beyond_bytes, "train": 600_000_000}, file)
    found = calibrated(device, file)
    assert (found.beyond_bytes("load"), found.beyond_bytes("train")) == (505_000_000, 600_000_000)
    assert (device.spare_bytes, found.spare_bytes) == (8 * MIB, 8 * MIB + 5_000_000)
    assert (other.spare_bytes, calibrated(other, file).spare_bytes) == (0, 0)
    assert found.overhead_bytes == device.overhead_bytes
    assert calibrated(other, file) == other
    for _ in range(KEPT):
        learn(device, {"load": 0}, file)
    assert calibrated(device, file).learned_bytes == {"load": device.overhead_bytes // 4, "train": 600_000_000}
    assert calibrated(device, file).spread_bytes == 4 * MIB


def test_stage_that_no_job_has_shown_takes_the_most_of_the_others(tmp_path: Path) -> None:
    """The side on which a plan is safe; without any job it is what the device's profile declares."""
    file, device = tmp_path / "calibration.json", device_profile("cpu")
    assert device.beyond_bytes("judge") == device.overhead_bytes
    learn(device, {"load": 450_000_000, "train": 470_000_000}, file)
    assert calibrated(device, file).beyond_bytes("judge") == 470_000_000


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b'{"Processor": [640000000]}', b"{"])
def test_a_broken_calibration_is_ignored_with_a_line_in_the_log(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read changes no plan, and the next job writes it anew."""
    file, device = tmp_path / "calibration.json", device_profile("cpu")
    file.write_bytes(content)
    assert calibrated(device, file) == device
    assert "calibration_ignored" in caplog.text
    learn(device, {"load": 500_000_000}, file)
    assert calibrated(device, file).beyond_bytes("load") == 500_000_000


def test_profile_without_weights_is_planned_like_one_with(tiny_model: Path) -> None:
    """A device that is not here is planned by its declared figures alone."""
    shape, job = read_shape(find_model(str(tiny_model))), _job(8 * GIB)
    here: DeviceProfile = device_profile("jetson-orin-nano-8gb")
    plan = make_estimate(shape, job, LENGTHS, here)
    assert all(stage.resident_bytes >= here.overhead_bytes for stage in plan.stages)
