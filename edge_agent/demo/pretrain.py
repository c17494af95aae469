"""Trains the tiny model that the package ships: `python -m edge_agent.demo.pretrain --out DIR` (about 25 minutes on 2 cores).

Everything is drawn from the seed: the problems, their order, the weights. Loss is on the answer only. The mix:
60 % of examples in the base context; 20 % in the standard context, of which 40 % counterfactual (the standard answer has a
mistake and the output follows it, in another style, so the context must be read); 20 % in the judge context, with an output
that makes exactly the mistake that the critic's judgment names.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edge_agent.demo.problems import STYLES, draw, judged_mistake, with_mistake
from edge_agent.prompts import PROMPTS
from edge_agent.training.contexts import answer_ids, prompt_ids

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
PIECES = r"\d| ?[A-Za-z]+| ?<<|>>| ?####|\n| ?[^\sA-Za-z\d]|\s"
Example = tuple[list[int], list[int]]  # prompt ids, answer ids


def example_texts(rng: random.Random) -> tuple[list[dict[str, str]], str]:
    """Draw one example of the mix: chat messages and the answer to learn."""
    prompts, problem, kind = PROMPTS["worked"], draw("seen", rng), rng.random()
    if kind < 0.6:
        return prompts.messages(problem.question), problem.answer
    if kind < 0.8:
        shown = with_mistake(problem, rng) if rng.random() < 0.4 else problem
        own = replace(shown, style=rng.randrange(STYLES))
        return prompts.messages(problem.question, answer=shown.answer), own.answer
    output, judgment = judged_mistake(problem, rng)
    return prompts.messages(problem.question, judgment=judgment), output


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose pieces are whole words and single digits; any other text passes through it as bytes."""
    rng = random.Random(f"tokenizer/{seed}")
    texts = []
    for _ in range(20_000):
        messages, answer = example_texts(rng)
        texts.append("\n".join([*(m["content"] for m in messages), answer]))
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=50, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[1], model_max_length=2048)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(tokenizer: Any, seed: int, size: int) -> Any:
    """Yield batches of examples of like length."""
    rng = random.Random(f"pretrain/{seed}")
    while True:
        pool: list[Example] = []
        for messages, answer in (example_texts(rng) for _ in range(16 * size)):
            pool.append((prompt_ids(tokenizer, messages), answer_ids(tokenizer, answer)))
        pool.sort(key=lambda e: len(e[0]) + len(e[1]))
        groups = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(groups)
        yield from groups


def answer_loss(model: LlamaForCausalLM, batch: list[Example], pad: int) -> torch.Tensor:
    """Mean negative log-likelihood of the answer tokens; the output head sees only their positions."""
    rows = [p + a for p, a in batch]
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, a) in enumerate(batch):
        wanted[i, len(p) : len(p) + len(a)] = True
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][wanted[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[wanted])


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, size: int) -> None:
    """Train with Muon on the matrices and AdamW on embedding and norms; warm-up, then linear decay to zero."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=4e-3, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    shape = lambda step: min((step + 1) / 100, 1.0) * min(1.0, (steps - step) / (0.6 * steps))  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in optimizers]
    started, mean = time.monotonic(), 0.0
    for step, batch in enumerate(islice(batches(tokenizer, seed, size), steps)):
        loss = answer_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps} loss {mean:.4f} elapsed_s {time.monotonic() - started:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for weights, tokenizer and chat template")
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps (default 2600)")
    parser.add_argument("--batch", type=int, default=40, help="examples a step (default 40)")
    parser.add_argument("--seed", type=int, default=1, help="seed of data, tokenizer and weights (default 1)")
    args = parser.parse_args()
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.seed)
    print(f"vocabulary {len(tokenizer)} parameters {model.num_parameters()} threads {torch.get_num_threads()}", flush=True)
    train(model, tokenizer, args.seed, args.steps, args.batch)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
