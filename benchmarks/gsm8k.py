"""Worked answers to GSM8K questions as the engine's samples, in tokens of a vocabulary of a real size.

The tokenizer is trained on GSM8K's own texts, so lengths are those that a model with such a vocabulary has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edge_agent.critic import judge_output
from edge_agent.dataset import Record
from edge_agent.job import NlftOptions
from edge_agent.prompts import PROMPTS, Prompts
from edge_agent.training.contexts import Sample, encode_target
from edge_agent.training.methods.method import Target
from edge_agent.training.methods.nlft import Nlft

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k"
VOCABULARY, LONGEST = 32_000, 4096
CALCULATION = re.compile(r"<<.*?>>")


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(directory: Path) -> Any:
    """Return a byte-level BPE tokenizer of the questions and answers of GSM8K's training part."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (text for row in _lines(directory / "train.jsonl") for text in (row["question"], CALCULATION.sub("", row["answer"])))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")  # noqa: S106


def instruction(directory: Path, tokenizer: Any, tokens: int) -> Prompts:
    """Return prompts whose instruction has about as many tokens as asked for: worked examples; 0 for an empty one."""
    text = PROMPTS["worked"].instruction if tokens else ""
    for row in _lines(directory / "train.jsonl"):
        longer = f"{text}\n\nQuestion: {row['question']}\nAnswer: {CALCULATION.sub('', row['answer'])}"
        if not tokens or len(tokenizer(longer)["input_ids"]) > tokens:
            break
        text = longer
    return Prompts(instruction=text)


def records(directory: Path, joined: int = 1) -> Iterator[Record]:
    """Yield questions with a model's own output, a correct and an incorrect one by turns; incorrect ones are judged by the critic.

    With `joined` a record is so many of them in one.
    """
    kinds: dict[bool, list[Record]] = {True: [], False: []}
    for row in _lines(directory / "model_outputs_6b.jsonl"):
        output, correct = (row["finetuning"][name] for name in ("solution", "is_correct"))
        judgment = None if correct else judge_output(output, row["answer"])
        kinds[correct].append(Record(row["question"], CALCULATION.sub("", row["answer"]), CALCULATION.sub("", output), judgment))
    for start in range(0, min(map(len, kinds.values())) - joined + 1, joined):
        for correct in (True, False):
            yield _join(kinds[correct][start : start + joined])


def _join(parts: list[Record]) -> Record:
    texts = [[p.question, p.answer or "", p.output or ""] for p in parts]
    judgments = [p.judgment for p in parts if p.judgment]
    question, answer, output = ("\n".join(column) for column in zip(*texts, strict=True))
    return Record(question, answer, output, "\n".join(judgments) or None)


def samples(directory: Path, count: int, instruction_tokens: int, joined: int, options: NlftOptions) -> tuple[Any, list[Sample]]:
    """Return a tokenizer and as many samples for NLFT, half of them incorrect, of `joined` questions each."""
    tokenizer = train_tokenizer(directory)
    prompts = instruction(directory, tokenizer, instruction_tokens)
    chosen = [r for r, _ in zip(records(directory, joined), range(count), strict=False)]
    targets = Nlft(options).targets(chosen, lambda r: r.judgment is None)
    return tokenizer, [encode_target(tokenizer, prompts, t, LONGEST) for t in targets]


def as_imitation(sample: Sample) -> Sample:
    """Return the sample as supervised fine-tuning has it: the same tokens, scored in no context."""
    return Sample(Target(sample.target.record, sample.target.text, "correct"), sample.answer, {"base": sample.prompts["base"]})
