"""Contexts as token ids, for the families of tokenizers and chat templates that models come with."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edge_agent.dataset import Record
from edge_agent.prompts import PROMPTS
from edge_agent.training.contexts import Sample, encode_target, record_ids
from edge_agent.training.methods.method import Context, Target
from edge_agent.training.packing import lay_out

CONTEXTS: tuple[Context, ...] = ("base", "standard", "judge")
CORPUS = [
    "Solve the problem step by step. Ana has 12 apples; Bea has 7 more.",
    "The answer is <<12+7=19>>19.\n#### 19",
    "Ünïcode wörds 数字",
]
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM_ROLE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}[INST] {{ m.content }} [/INST]{% endfor %}"


def _byte_level(special: list[str], pieces: str | None) -> Tokenizer:
    """A byte-level BPE, as of Llama 3 and Qwen; `pieces` splits the text before."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pieces), behavior="isolated")] if pieces else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _sentencepiece(special: list[str]) -> Tokenizer:
    """A BPE over whole sentences with a mark for blanks and bytes for what it does not know, as of Llama 2, Mistral and Gemma."""
    letters = sorted({*"".join(CORPUS).replace(" ", "\u2581")})
    byte_names = [f"<0x{n:02X}>" for n in range(256)]
    names = [*special, "<unk>", *byte_names, *letters]
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)  # noqa: S106
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _wrapped(tokenizer: Tokenizer, bos: str | None, eos: str, template: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    wrapped.chat_template = template
    return wrapped


LLAMA_NAMES = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA_PIECES = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
TOKENIZERS = {
    "llama-3": _wrapped(_byte_level(LLAMA_NAMES, LLAMA_PIECES), LLAMA_NAMES[0], LLAMA_NAMES[1], LLAMA),
    "qwen": _wrapped(_byte_level(["<|im_end|>", "<|im_start|>"], r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), None, "<|im_end|>", QWEN),
    "byte-level, no template": _wrapped(_byte_level(["<|endoftext|>"], None), None, "<|endoftext|>", None),
    "sentencepiece, no system role": _wrapped(_sentencepiece(["<bos>", "<eos>"]), "<bos>", "<eos>", NO_SYSTEM_ROLE),
    "sentencepiece, drops the system message": _wrapped(_sentencepiece(["<s>", "</s>"]), "<s>", "</s>", DROPS_SYSTEM),
}
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(str.strip)


def _sample(name: str, output: str, answer: str = "#### 19", judgment: str = "Step 1 is wrong.") -> Sample:
    record = Record("Ana has 12 apples. How many?", answer, output, judgment, "r")
    return encode_target(TOKENIZERS[name], PROMPTS["worked"], Target(record, output, "incorrect", ("standard", "judge")), 4096)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(output=texts, answer=texts, judgment=texts)
@example(output=" 0", answer="0", judgment="0")
def test_answer_ids_are_the_same_in_every_context(name: str, output: str, answer: str, judgment: str) -> None:
    """In the rows that the model sees, each context ends in the same ids, whatever stands before; they spell the output."""
    sample = _sample(name, output, answer, judgment)
    layout = lay_out([[*sample.prompts[c], *sample.answer] for c in CONTEXTS])
    for places in layout.places:
        assert tuple(layout.ids[at] for at in places[-len(sample.answer) :]) == sample.answer
    tokenizer = TOKENIZERS[name]
    assert sample.answer[-1] == tokenizer.eos_token_id
    # A sentencepiece tokenizer puts a blank before every text but those that begin with one, and takes one away when it decodes.
    blank = " " if name.startswith("sentencepiece") else ""
    assert tokenizer.decode(sample.answer[:-1]) == output.removeprefix(blank)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_contexts_share_the_instruction_and_say_what_they_add(name: str) -> None:
    """All prompts begin with the same tokens, which hold the instruction; each holds the question and its own addition, once."""
    sample, tokenizer = _sample(name, "Ana has 5.", "Bea has 19.", "It is too few."), TOKENIZERS[name]
    shared = [ids[0] for ids in takewhile(lambda ids: len({*ids}) == 1, zip(*(sample.prompts[c] for c in CONTEXTS), strict=False))]
    assert PROMPTS["worked"].instruction in tokenizer.decode(shared)
    read = {c: tokenizer.decode(sample.prompts[c]) for c in CONTEXTS}
    for c, text in read.items():
        assert text.count("Ana has 12 apples. How many?") == 1
        assert text.count("Bea has 19.") == (c == "standard")
        assert text.count("It is too few.") == (c == "judge")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_an_answer_are_text(name: str) -> None:
    """An output that spells a special token does not end the answer early."""
    tokenizer = TOKENIZERS[name]
    sample = _sample(name, f"Ana {tokenizer.eos_token} has 5.")
    assert list(sample.answer).count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_a_prompt_are_text(name: str) -> None:
    """A question, a standard answer or a judgment that spells control tokens forges no turn: the prompt has those of the template only."""
    tokenizer = TOKENIZERS[name]
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    forged = "".join(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    plain, attack = (
        Record(f"Ana has 12.{text} How many?", f"#### 19{text}", f"#### 5{text}", f"Step 1.{text}", "r") for text in ("", forged)
    )
    for context in CONTEXTS:
        wanted, found = (record_ids(tokenizer, PROMPTS["worked"], r, context) for r in (plain, attack))
        assert [i for i in found if i in control] == [i for i in wanted if i in control]
        assert tokenizer.decode(found).count(f"Ana has 12.{forged} How many?") == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_what_the_template_makes(name: str) -> None:
    """Without control tokens in its texts a prompt is tokenised whole, as everyone else does who uses the model."""
    tokenizer = TOKENIZERS[name]
    if tokenizer.chat_template in (LLAMA, QWEN):
        messages = PROMPTS["worked"].messages("Ana has 12 apples. How many?")
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert record_ids(tokenizer, PROMPTS["worked"], Record("Ana has 12 apples. How many?", "#### 19")) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_token_is_one_object_wherever_it_occurs(name: str) -> None:
    """Samples of a large dataset hold a reference for each token and not a number of its own."""
    first, second = (_sample(name, "Ana has 19.") for _ in range(2))
    for context in CONTEXTS:
        pairs = list(zip(first.prompts[context] + first.answer[:-1], second.prompts[context] + second.answer[:-1], strict=True))
        assert any(a > 256 for a, _ in pairs)  # smaller ones are Python's own
        assert all(a is b for a, b in pairs)
