"""Loading in 4 bits, and the trap of evaluating before training."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import DEADLINE_S
from safetensors.torch import load_file, save_file
from test_trees import SHAPES
from transformers import AutoModelForCausalLM, BioGptConfig, LlamaConfig

from edge_agent.errors import ModelMissing, ModelUnsafe, ModelUnsupported
from edge_agent.job import Lora
from edge_agent.training.head import weighted_loss
from edge_agent.training.packing import answer_hidden, pack, reads_trees
from profiles.device import device_profile
from quantization import nf4
from quantization.adapter import attach_adapter, checkpoint_activations
from quantization.load import load_model
from quantization.model_files import find_model, weight_files
from quantization.nf4 import KERNEL_VARIABLE, choose_kernel, dequantize, quantize
from quantization.stored import stored_tensors
from quantization.vocabulary import FileEmbedding, Nf4Head

ROWS = [(list(range(5, 45)), list(range(50, 70)))]
CPU = device_profile("cpu")
PLACES: list[dict[str, bool]] = [
    {}, {"quantized_head": True}, {"embedding_on_host": True}, {"quantized_head": True, "embedding_on_host": True},
]  # fmt: skip
"""Where embedding and head may be."""


def _gradients(tiny_model: Path, *, evaluate_first: bool, guard: bool) -> dict[str, torch.Tensor]:
    """LoRA gradients of one loss, after a forward pass in `.eval()` without gradient or on a fresh model."""
    model: Any = load_model(find_model(str(tiny_model)), CPU)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and not guard:
            module.support_avx512bf16_for_cpu = _has_avx512bf16()
    model = attach_adapter(model, Lora(), 3, "tiny")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    packed = pack(model, ROWS, 1)
    if evaluate_first:
        with torch.no_grad():
            model.eval()
            answer_hidden(model, packed)
    ones = torch.ones(len(ROWS[0][1]))
    model.train()
    weighted_loss(model, answer_hidden(model, packed), packed.target_ids_N, ones, torch.zeros_like(ones), 64).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _has_avx512bf16() -> bool:
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def test_model_is_nf4_with_double_quantisation(tiny_model: Path) -> None:
    """Every linear layer but the head is NF4 with nested scales; nothing is trainable."""
    model = load_model(find_model(str(tiny_model)), CPU)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 4 * 7
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)
    assert not any(p.requires_grad for p in model.parameters())


def test_evaluating_first_changes_no_gradient(tiny_model: Path) -> None:
    """Evaluate, then train gives the gradients of training alone, bit for bit."""
    alone = _gradients(tiny_model, evaluate_first=False, guard=True)
    after = _gradients(tiny_model, evaluate_first=True, guard=True)
    assert len(alone) == 4 * 7 * 2
    assert alone.keys() == after.keys()
    assert all(torch.equal(alone[name], after[name]) for name in alone)


@pytest.mark.skipif(not _has_avx512bf16(), reason="THE TRAP NEEDS A CPU WITH AVX512-BF16: this check of the guard did not run")
@pytest.mark.filterwarnings("ignore")
def test_without_the_guard_gradients_would_be_wrong(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is needed: with it off, the same comparison fails on this CPU."""
    monkeypatch.setenv(KERNEL_VARIABLE, "bitsandbytes")
    alone = _gradients(tiny_model, evaluate_first=False, guard=True)
    after = _gradients(tiny_model, evaluate_first=True, guard=False)
    assert any(name not in after or not torch.allclose(alone[name], after[name], rtol=0.05) for name in alone)


def _random(directory: Path, shape: str, tied: bool, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model of a shape with random weights."""
    config = copy.deepcopy(SHAPES[shape])
    config.update({"tie_word_embeddings": tied})
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)
    return directory


def _rounded(directory: Path, *, quantized_head: bool = False, embedding_on_host: bool = False) -> Any:
    """The same model in 32 bits by transformers alone, each weight as NF4 rounds it."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    held = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head] + [head] * quantized_head
    if quantized_head and head.weight is not embedding.weight and not embedding_on_host:
        held.append(embedding)
    for module in held:
        module.weight.data = dequantize(quantize(module.weight.data, torch.float32, choose_kernel("cpu")), torch.float32)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_model_is_the_same_wherever_its_vocabulary_is(shape: str, tied: bool, tmp_path: Path) -> None:
    """Logits are those of transformers with weights rounded to NF4, trees are read, and generation writes the same."""
    files = find_model(str(_random(tmp_path / "model", shape, tied)))
    ids = torch.arange(3, 23)[None]
    for place in PLACES:
        model, wanted = load_model(files, CPU, **place), _rounded(files.path, **place)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, wanted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert reads_trees(model)
        assert isinstance(model.get_input_embeddings(), FileEmbedding) == (not tied and place.get("embedding_on_host", False))
        if tied and place.get("quantized_head"):
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **settings), wanted.generate(ids, **settings))


@pytest.mark.parametrize("place", PLACES)
def test_gradients_pass_the_head_in_slices(place: dict[str, bool], tmp_path: Path) -> None:
    """The gradient of the hidden states is that of the whole matrix."""
    files = find_model(str(_random(tmp_path / "model", "Phi", tied=False)))
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for model in (load_model(files, CPU, **place), _rounded(files.path, **place)):
        logits = model.get_output_embeddings()(hidden)
        found += [logits.detach(), *torch.autograd.grad(logits.square().sum(), hidden)]
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-5)


def test_gradients_of_a_head_in_16_bits_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand slices give the gradient of the hidden states to the rounding of the product with the whole matrix."""
    monkeypatch.setattr(nf4, "SLICE", 64 * 64)
    generator, like = torch.Generator().manual_seed(0), torch.nn.Linear(64, 64_000, bias=False, dtype=torch.bfloat16)
    head = Nf4Head(like)
    head.weight = quantize(like.weight.detach(), torch.bfloat16, "torch")
    hidden = torch.randn(8, 64, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(8, 64_000, generator=generator).bfloat16()
    (found,) = torch.autograd.grad(head(hidden), hidden, grad)
    whole = dequantize(head.weight, torch.bfloat16)
    exact = grad.float() @ whole.float()
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() <= 2 * ((grad @ whole).float() - exact).norm()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_no_wide_copy_of_embedding_or_head(tied: bool, stored: torch.dtype, tmp_path: Path) -> None:
    """Both keep the 16 bits of their file where the model computes in 32; norms have 32, and the two are one tensor where they are tied."""
    model = load_model(find_model(str(_random(tmp_path / "model", "Llama", tied, stored))), CPU)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.dtype == head.dtype == stored
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {torch.float32}
    assert not [p for p in model.parameters() if p.dtype == torch.float32 and p.dim() > 1]
    assert model.get_input_embeddings()(torch.tensor([1])).dtype == torch.float32


def test_weights_stored_in_32_bits_are_quantised_from_16(tmp_path: Path) -> None:
    """So a model is the same on a device that computes in 16 bits; what is not quantised keeps its 32 on one that does not."""
    path = _random(tmp_path / "wide", "Llama", tied=False, dtype=torch.float32)
    narrow: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    models = [load_model(find_model(str(tmp_path / name)), CPU) for name in ("wide", "narrow")]
    layers = [[m.weight for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)] for model in models]
    assert all(
        torch.equal(a.data, b.data) and torch.equal(a.quant_state.absmax, b.quant_state.absmax) for a, b in zip(*layers, strict=True)
    )
    assert models[0].get_input_embeddings().weight.dtype == torch.float32


def test_embedding_in_its_file_reads_only_what_is_looked_up(tmp_path: Path) -> None:
    """Rows of a part of the file that is gone afterwards cannot be read any more; the others can."""
    path = _random(tmp_path / "model", "Llama", tied=False)
    model = load_model(find_model(str(path)), CPU, embedding_on_host=True)
    embedding = model.get_input_embeddings()
    wanted = embedding(torch.tensor([[7, 3, 7]]))
    assert not list(embedding.parameters())
    name = "model.embed_tokens.weight"
    stored = stored_tensors(weight_files(path))[name]
    assert torch.equal(wanted[0].bfloat16(), stored[...][[7, 3, 7]])
    with stored.file.open("r+b") as file:
        file.truncate(stored.start() + 8 * 48 * 2)
    assert torch.equal(embedding(torch.tensor([[7, 3, 7]])), wanted)
    with pytest.raises((RuntimeError, ValueError)):
        embedding(torch.tensor([[150]]))


PEAK = """
import sys
from profiles.memory import HostMemory, fix_malloc
fix_malloc()
from quantization.cache import ModelCache, own_weights
from quantization.load import load_model
from quantization.model_files import find_model
from profiles.device import device_profile
from pathlib import Path
tiny, model, cache = sys.argv[1:]
load_model(find_model(tiny), device_profile("cpu"))
files, memory = find_model(model), HostMemory()
memory.release()
before = memory.current_bytes()
loaded = load_model(files, device_profile("cpu"), cache=ModelCache(Path(cache), 2**30))
print(memory.peak_bytes() - before, sum(w.numel() * w.element_size() for w in own_weights(loaded).values()))
"""


@pytest.mark.slow
def test_loading_takes_little_more_than_the_model_it_leaves(tiny_model: Path, tmp_path: Path) -> None:
    """In a fresh process the peak is the quantised model and a few of its largest tensors, less than the file; from the cache as well."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8, vocab_size=4000)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    largest_bytes = max(p.numel() for p in model.parameters()) * 2
    model.save_pretrained(tmp_path / "model")
    file_bytes = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    for _ in ("made", "from the cache"):
        command = [sys.executable, "-c", PEAK, str(tiny_model), str(tmp_path / "model"), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
        peak_bytes, held_bytes = map(int, done.stdout.split())
        bound_bytes = held_bytes + 4 * largest_bytes + 32 * 2**20
        assert bound_bytes < file_bytes
        assert held_bytes < peak_bytes < bound_bytes


CAPPED = """
import sys
import traceback
from profiles.memory import HostCap, HostMemory, fix_malloc, lacks_memory
fix_malloc()
from quantization.load import load_model
from quantization.model_files import find_model
from profiles.device import device_profile
tiny, model, room_bytes = sys.argv[1:]
load_model(find_model(tiny), device_profile("cpu"))
cap = HostCap(HostMemory().current_bytes() + int(room_bytes))
cap.renew()
try:
    load_model(find_model(model), device_profile("cpu"))
except Exception as error:
    cap.lift()
    places = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    print(type(error).__name__, lacks_memory(error), "quantize" in places)
"""


def test_lack_of_memory_while_quantising_is_one(tiny_model: Path, tmp_path: Path) -> None:
    """Where a matrix can be read and its NF4 has no room beside it, the error is that of the allocation, not of an unknown model."""
    config = LlamaConfig(hidden_size=512, intermediate_size=32768, num_hidden_layers=1, num_attention_heads=8, vocab_size=100)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", CAPPED, str(tiny_model), str(tmp_path / "model"), str(36 * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stdout.split() == ["RuntimeError", "True", "True"], done.stdout + done.stderr


@pytest.mark.parametrize("place", PLACES)
def test_adapters_are_on_the_layers_wherever_the_vocabulary_is(tmp_path: Path, place: dict[str, bool]) -> None:
    """`all` means every linear layer but the output head, in NF4 or not."""
    model = load_model(find_model(str(_random(tmp_path / "model", "Llama", tied=False))), CPU, **place)
    model = attach_adapter(model, Lora(), 3, "random")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4 * 7
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("shape", ["Llama", "Gemma 2, capped scores and a window in half of the layers", "Phi"])
def test_packs_of_nf4_layers_give_the_gradients_of_single_rows(tmp_path: Path, shape: str, offload: bool) -> None:
    """To 1e-5, where layers are computed again and the last one skips the prompts, of each row alone where neither is so."""
    instruction = list(range(10, 40))
    rows = [([*instruction, 50 + n, 60], [70 + n, 80, 90 + n][: 1 + n % 3]) for n in range(4)]

    def gradients(micro_batch: int, checkpointing: bool) -> torch.Tensor:
        model = load_model(find_model(str(tmp_path / "model")), CPU)
        model = attach_adapter(model, Lora(dropout=0.0), 3, "random").train()
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
        if checkpointing:
            checkpoint_activations(model)
        for start in range(0, len(rows), micro_batch):
            packed = pack(model, rows[start : start + micro_batch], 0)
            if not checkpointing:
                packed.inputs["tree"].asked_A = None
            ones_N = torch.ones(len(packed.target_ids_N))
            hidden_ND = answer_hidden(model, packed, offload and checkpointing)
            weighted_loss(model, hidden_ND, packed.target_ids_N, ones_N, ones_N / 2, 7).total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    _random(tmp_path / "model", shape, tied=True)
    wanted, found = gradients(1, checkpointing=False), gradients(4, checkpointing=True)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def _model_directory(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def test_unknown_model_is_missing(tmp_path: Path) -> None:
    """A name that is no directory and not cached, and a directory without weights."""
    with pytest.raises(ModelMissing, match="Hugging Face cache"):
        find_model("nobody/no-such-model")
    with pytest.raises(ModelMissing, match="no such directory"):
        find_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelMissing, match=r"no \*\.safetensors"):
        find_model(str(_model_directory(tmp_path / "empty")))


def test_models_that_would_run_code_are_refused(tmp_path: Path) -> None:
    """Pickled weights only, or Python files of their own."""
    pickled = _model_directory(tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelUnsafe, match="pickled weights only"):
        find_model(str(pickled))
    with pytest.raises(ModelUnsafe, match="auto_map"):
        find_model(str(_model_directory(tmp_path / "code", auto_map={"AutoModelForCausalLM": "model.Model"})))


def test_weights_that_are_stored_quantised_are_refused(tmp_path: Path) -> None:
    """Their sizes in the file are not those of the layers, so no plan would hold."""
    stored = _model_directory(tmp_path / "stored", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelUnsupported, match=r"stored quantised .* give the unquantised model"):
        find_model(str(stored))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "lost", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_weights_that_a_file_lacks_are_named(lost: str, place: dict[str, bool], tmp_path: Path) -> None:
    """Whatever layer it is of, a weight that is not there is not drawn at random."""
    path = _random(tmp_path / "model", "Llama", tied=False)
    weights = load_file(path / "model.safetensors")
    del weights[lost]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnsupported, match=f"lack {lost}; fetch the model again"):
        load_model(find_model(str(path)), CPU, **place)


def test_half_of_a_model_is_not_taken_for_a_whole(tmp_path: Path) -> None:
    """Of two files without an index one is missing: its weights are named, the first of them."""
    path = _random(tmp_path / "model", "Llama", tied=True)
    weights = load_file(path / "model.safetensors")
    half = {name: weight for name, weight in weights.items() if "layers.2" not in name}
    save_file(half, path / "model-00001-of-00002.safetensors", {"format": "pt"})
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match=r"lack model\.layers\.2\.input_layernorm\.weight, .* and 6 more; fetch"):
        load_model(find_model(str(path)), CPU)


def test_embedding_of_another_kind_does_not_stay_in_its_file(tmp_path: Path) -> None:
    """It is refused by name, as nothing would read it there."""
    config = BioGptConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=200)
    config.update({"tie_word_embeddings": False})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelUnsupported, match="BioGptScaledWordEmbedding, cannot stay in its file"):
        load_model(find_model(str(tmp_path / "model")), CPU, embedding_on_host=True)


@pytest.mark.parametrize("data", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00no"])
def test_broken_weight_files_are_refused(tmp_path: Path, data: bytes) -> None:
    """A cut-off download is named."""
    broken = _model_directory(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelUnsupported, match="fetch the model again"):
        find_model(str(broken))
