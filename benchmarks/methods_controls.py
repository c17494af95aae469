"""Controls of benchmarks/methods.py: NLFT with one thing taken away, judgments of an oracle, and the model in 32 bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM

from edge_agent.critic import Equation, equations, evaluate
from edge_agent.dataset import Record, is_correct
from edge_agent.demo.problems import Problem, results
from edge_agent.job import Judging, Sampling
from edge_agent.prompts import PROMPTS
from edge_agent.training.completion import Completion
from edge_agent.training.head import AnswerScores
from edge_agent.training.methods.method import IsCorrect, Scores, Target, Weights
from edge_agent.training.methods.nlft import Nlft
from edge_agent.training.repair import repair_outputs
from edge_agent.verify import numeric_match
from profiles.device import DeviceProfile, device_profile
from quantization.load import load_model, load_tokenizer
from quantization.model_files import ModelFiles, find_model


class AllOnes(Nlft):
    """The same targets, with weight 1 on every token of the correct ones and none on the wrong ones."""

    def weights(self, target: Target, scores: Scores) -> Weights:
        zeros_T = torch.zeros_like(scores.base_logp_T)
        return Weights(torch.ones_like(zeros_T) if target.kind == "correct" else zeros_T, zeros_T)


class NoWrongOutputs(Nlft):
    """Correct outputs, and standard answers where the options have them."""

    def targets(self, records: list[Record], is_correct: IsCorrect) -> list[Target]:
        return [t for t in super().targets(records, is_correct) if t.kind == "correct"]


class RandomTokens(Nlft):
    """As many tokens of each wrong output made unlikely, with the same weights, but drawn at random."""

    def weights(self, target: Target, scores: Scores) -> Weights:
        weights = super().weights(target, scores)
        order = torch.randperm(len(scores.base_logp_T), generator=torch.Generator().manual_seed(len(target.text)))
        return Weights(weights.likelihood_T, weights.unlikelihood_T[order])


class JudgeLikelihood(Nlft):
    """Wrong outputs are also imitated in the judge context, as CUT does (A1 without its mistake)."""

    trained_in = ("base", "judge")

    def targets(self, records: list[Record], is_correct: IsCorrect) -> list[Target]:
        chosen = super().targets(records, is_correct)
        return chosen + [Target(t.record, t.text, "correct", (), "judge") for t in chosen if t.kind == "incorrect"]

    def weights(self, target: Target, scores: Scores) -> Weights:
        if target.prompt == "base":
            return super().weights(target, scores)
        ones_T = torch.ones_like(scores.base_logp_T)
        return Weights(ones_T, torch.zeros_like(ones_T))


def judged_by_oracle(records: list[Record], chosen: dict[str, Problem]) -> list[Record]:
    """Return the records with judgments of the program that made the questions: it knows the steps, not only the text of an answer."""
    judged = []
    for record in records:
        if record.output is None or is_correct(record, numeric_match):
            judged.append(record)
        else:
            judged.append(msgspec.structs.replace(record, judgment=_oracle(record.output, chosen[record.question])))
    return judged


def _oracle(output: str, problem: Problem) -> str:
    """Name the first step that is not the program's step in its place, in the critic's words."""
    ours = equations(output)
    right = [
        Equation(f"{left}{step.op}{right}", str(value))
        for step, (left, right, value) in zip(problem.steps, results(problem.steps), strict=True)
    ]
    for number, (said, wanted) in enumerate(zip(ours, right, strict=False), start=1):
        if said.right != wanted.right or evaluate(said.left) != evaluate(wanted.left):
            return f"Step {number} says {said}. It should be {wanted}."
    if len(ours) < len(right):
        return f"It stops after step {len(ours)}. Step {len(ours) + 1} should be {right[len(ours)]}."
    if len(ours) > len(right):
        return f"Step {len(right) + 1} says {ours[len(right)]}. It is not needed."
    return f"The final answer should be {right[-1].right}."


def repaired_at_random(model: Path, records: list[Record], seed: int, folder: Path) -> list[Record]:
    """Return the records with wrong outputs repaired from a token that is drawn at random, where the verifier finds that correct."""
    files, rng = find_model(str(model)), random.Random(f"random repairs/{seed}")

    def anywhere(scores: AnswerScores) -> int | None:
        return rng.randrange(len(scores.logp_N))

    completion = Completion(
        model=load_model(files, device_profile("cpu")), tokenizer=load_tokenizer(files), prompts=PROMPTS["worked"], sampling=Sampling(),
        judging=Judging(), endpoint=None, is_correct=lambda r: is_correct(r, numeric_match), seed=seed,
        context_tokens=files.context_tokens, contexts=("standard", "judge"), max_new_tokens=120, batch=64, directory=folder,
        progress=lambda *_: None,
    )  # fmt: skip
    return repair_outputs(completion, records, anywhere, 16, 256)[0]


def load_float32(files: ModelFiles, device: DeviceProfile, **_: Any) -> Any:
    """Return the model as it is stored, in 32 bits."""
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32, local_files_only=True).to(device.torch_device)
    return model.requires_grad_(False).eval()
