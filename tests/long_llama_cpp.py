"""The LoRA file that `edge-agent export --format gguf` writes, in llama.cpp itself: it changes the model's next token as PEFT does."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY
from lacking import lack
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from edge_agent.adapters.llama_cpp import ARCHITECTURES, REORDERED
from edge_agent.adapters.source import find_source

if find_spec("xllamacpp") is None:
    lack("LLAMA.CPP ABSENT: `pip install xllamacpp`; no file was loaded by it", whole_file=True)
xllamacpp = import_module("xllamacpp")
IDS = [300, 17, 451, 9, 620, 88, 45, 301, 12, 530]


def _model(kind: str) -> Any:
    """A small model of an architecture with random weights large enough to matter."""
    torch.manual_seed(1)
    gemma, window = "gemma" in kind, 128 if kind in ("gemma2", "gemma3_text") else None
    sizes = {
        "vocab_size": 704, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": gemma, "sliding_window": window,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "query_pre_attn_scalar": 16,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.15)
    return model.eval()


def _write_base(model: Any, kind: str, file: Path) -> None:
    """Write the model for llama.cpp, with the tokenizer of the shipped one."""
    config, name = model.config, ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    vocabulary = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    vocabulary |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    control = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary.get(n, f"[unused{n}]") for n in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.CONTROL if n in control else gguf.TokenType.NORMAL for n in range(config.vocab_size)])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map({n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}[name], config.num_hidden_layers)
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy() + (1 if "gemma" in kind and "norm" in own else 0)  # a Gemma's norms multiply by 1 + weight
        if kind in REORDERED and (heads := _heads(own, config)):
            # As llama.cpp's own converter has it: half by half becomes pair by pair.
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(own, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope(config: Any) -> float:
    """The base of the rotation; of the layers that see all, where they have one of their own."""
    rope = config.rope_parameters
    return float(rope.get("full_attention", rope)["rope_theta"])


def _heads(name: str, config: Any) -> int | None:
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2] if "." in name else "")


def _top(server: Any, scale: float) -> dict[int, float]:
    """Return the log-probabilities of the most likely next tokens, with the adapter at a scale."""
    request = {"prompt": IDS, "n_predict": 1, "n_probs": 20, "temperature": 0.0, "lora": [{"id": 0, "scale": scale}], "cache_prompt": False}
    [first] = server.handle_completions(request)["choices"][0]["logprobs"]["content"][:1]
    return {row["id"]: row["logprob"] for row in first["top_logprobs"]}


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_llama_cpp_applies_the_adapter_as_peft_does(kind: str, tmp_path: Path) -> None:
    """The next token's log-probabilities without and with the adapter are those of PEFT, and the adapter changes them by far more."""
    from edge_agent.adapters.export import export

    model = _model(kind)
    base = tmp_path / "base"
    model.save_pretrained(base)
    for file in TINY.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    _write_base(model, kind, tmp_path / "base.gguf")
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    export(find_source(tmp_path / "adapter"), str(base), tmp_path / "out", "gguf", "stored")
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "base.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = str(tmp_path / "out" / "adapter.gguf"), 1.0
    params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    wanted, without = _logp(adapted), None
    with adapted.disable_adapter():
        without = _logp(adapted)
    assert float((wanted - without).abs().max()) > 0.5
    for scale, logp_V in ((0.0, without), (1.0, wanted)):
        found = _top(server, scale)
        assert len(found) == 20
        assert max(abs(logp - float(logp_V[token])) for token, logp in found.items()) < 2e-2


@torch.no_grad()
def _logp(model: PeftModel) -> torch.Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0, -1].float().log_softmax(-1)
