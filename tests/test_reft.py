"""ReFT: its reward, its estimates and losses by hand, what PPO does to a policy, and its exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Killed, Tiny, adapter, gradients, judged_records, kill_after, silent

from edge_agent.errors import JobSchema, Stopped
from edge_agent.job import Dataset, Evaluation, Job, ReftOptions, Schedule
from edge_agent.training.generate import generate
from edge_agent.training.loop import optimize
from edge_agent.training.methods.reft import Reft, reward
from edge_agent.training.ppo import Answers, Reinforced, Rollout, advantages, estimate, ppo_loss, whiten
from edge_agent.training.prepare import prepare_files
from edge_agent.verify import choice_match, exact_match, numeric_match


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Tiny:
    return Tiny(tiny_model)


@pytest.mark.parametrize(
    ("output", "answer", "verifier", "wanted"),
    [
        ("3+4=7\n#### 7", "#### 7", numeric_match, 1.0),
        ("3+4=8\n#### 8", "#### 7", numeric_match, 0.1),
        ("I do not know.", "#### 7", numeric_match, 0.0),
        ("", "#### 7", numeric_match, 0.0),
        ("The answer is B", "C", choice_match, 0.1),
        ("neither", "C", choice_match, 0.0),
        ("", "yes", exact_match, 0.0),
    ],
)
def test_reward_looks_at_the_final_answer(output: str, answer: str, verifier: Any, wanted: float) -> None:
    """1 for the right final answer, 0.1 for another one, 0 for none."""
    assert reward(output, answer, verifier, 0.1) == wanted


def test_reft_needs_a_verifier(tiny_model: Path) -> None:
    """Without one there is no reward, and the job is refused before the model is loaded."""
    job = Job(
        model=str(tiny_model), dataset=Dataset("0" * 64), budget_bytes=2**30, method=ReftOptions(), evaluation=Evaluation(verifier="none")
    )
    with pytest.raises(JobSchema, match="by a verifier"):
        prepare_files(job, judged_records(4), None)


def test_advantages_by_hand() -> None:
    """delta_t = r_t + gamma V_t+1 - V_t with V = 0 after the end, A_t = delta_t + gamma lambda A_t+1, and the return is A_t + V_t."""
    rewards, values = torch.tensor([0.5, 0.0, 1.0]), torch.tensor([0.2, 0.4, 0.3])
    advantage, returns = advantages(rewards, values, gamma=0.9, gae_lambda=0.5)
    last = 1.0 - 0.3
    middle = 0.9 * 0.3 - 0.4 + 0.45 * last
    first = 0.5 + 0.9 * 0.4 - 0.2 + 0.45 * middle
    assert advantage.tolist() == pytest.approx([first, middle, last])
    assert returns.tolist() == pytest.approx([first + 0.2, middle + 0.4, last + 0.3])
    # Without discount and decay the return of every token is the sum of all rewards after it.
    assert advantages(rewards, values, 1.0, 1.0)[1].tolist() == pytest.approx([1.5, 1.0, 1.0])


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    """Whatever their shift and scale; equal values become 0."""
    found = whiten(torch.tensor([1.0, 2.0, 6.0]))
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.var(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert whiten(torch.full((3,), 0.7)).abs().max() < 1e-2


def test_penalty_is_on_every_token_and_reward_on_the_last_one() -> None:
    """The return of a token, without discount and decay, is the reward of its answer minus beta times the log-ratios from it on."""
    answers = Answers(torch.tensor([4, 7]), torch.tensor([2, 3]), torch.arange(5))
    kl, zeros = torch.tensor([0.1, 0.2, 0.0, -0.3, 0.4]), torch.zeros(5)
    options = ReftOptions(kl_coefficient=0.5, gae_lambda=1.0)
    found = estimate(answers, torch.tensor([1.0, 0.1]), kl, zeros, zeros, options)
    assert found.return_N.tolist() == pytest.approx([1 - 0.15, 1 - 0.1, 0.1 - 0.05, 0.1 - 0.05, 0.1 - 0.2])
    assert found.kl_B.tolist() == pytest.approx([0.3, 0.1])
    assert found.shares.tolist() == pytest.approx([1 / 4] * 2 + [1 / 6] * 3)
    torch.testing.assert_close(found.advantage_N, whiten(found.return_N))


def _rollout(logp: list[float], value: list[float], advantage: list[float], returns: list[float]) -> Rollout:
    unused = [torch.zeros(1)] * 5
    return Rollout(*unused, *map(torch.tensor, (logp, value, advantage, returns)))


def test_loss_is_clipped_on_both_sides() -> None:
    """A ratio that has left 1 +- epsilon in the direction of its advantage has no gradient any more; a value is clipped likewise."""
    old = _rollout([-1.0] * 4, [0.0, 0.0, 0.0, 0.5], [1.0, 1.0, -1.0, -1.0], [0.0, 0.1, 0.0, 1.0])
    logp = (torch.tensor([1.5, 0.5, 1.5, 0.5]).log() - 1).requires_grad_()
    value = torch.tensor([0.0, 0.3, 0.0, 0.9], requires_grad=True)
    loss = ppo_loss(logp, value, old, slice(0, 4), ReftOptions(value_coefficient=2.0))
    policy = [-1.2, -0.5, 1.5, 0.8]
    worst = [0.0, max(0.2**2, 0.1**2), 0.0, max(0.1**2, 0.3**2)]
    assert loss.tolist() == pytest.approx([p + 2 * 0.5 * w for p, w in zip(policy, worst, strict=True)])
    loss.sum().backward()
    assert [bool(g) for g in logp.grad] == [False, True, True, False]
    assert [bool(g) for g in value.grad] == [False, True, False, False]


def test_each_answer_has_the_room_of_its_question(tiny: Tiny, tmp_path: Path) -> None:
    """A question that nearly fills the context shortens its own answer and no other."""
    method = Reft(ReftOptions(warmup_epochs=0))
    samples = tiny.samples(method, judged_records(3))
    longest = max(len(s.prompts["base"]) for s in samples)
    training = replace(tiny.training(method, tmp_path, Schedule(batch=3, updates=2)), max_new_tokens=50, context_tokens=longest + 3)
    with tiny.adapted() as model:
        objective = tiny.objective(model, samples, training, Reinforced)
        objective.backward(0, silent)
    rollout = objective.rollout
    room = [longest + 3 - len(samples[i].prompts["base"]) for i in rollout.question_B.tolist()]
    assert min(room) == 3
    assert all(length <= most for length, most in zip(rollout.length_B.tolist(), room, strict=True))
    assert max(rollout.length_B.tolist()) > 3


def test_gradient_of_ppo_equals_the_formula(tiny: Tiny, tmp_path: Path) -> None:
    """In micro-batches and chunks, with a policy that has moved since it was sampled: gradients of adapter and value head."""
    method = Reft(ReftOptions(warmup_epochs=0))
    samples = tiny.samples(method, judged_records(3))
    training = replace(tiny.training(method, tmp_path, Schedule(batch=3, updates=2), micro_batch=2), max_new_tokens=12)
    with tiny.adapted(moved=0.05) as model:
        objective = tiny.objective(model, samples, training, Reinforced)
        objective.backward(0, silent)
        gradients(model)
        for parameter in objective.parameters.values():
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
            parameter.grad = None
        loss, _ = objective.backward(1, silent)
        found = {name: p.grad.clone() for name, p in objective.parameters.items()}
        old, place, total = objective.rollout, 0, torch.zeros(())
        for question, length in zip(old.question_B.tolist(), old.length_B.tolist(), strict=True):
            prompt, answer = samples[question].prompts["base"], old.ids_N[place : place + length].tolist()
            output = model(input_ids=torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
            logp = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            hidden = output.hidden_states[-1][0, len(prompt) - 1 : -1]
            value = hidden @ objective.parameters["value.weight"][0] + objective.parameters["value.bias"]
            total = total + ppo_loss(logp, value, old, slice(place, place + length), ReftOptions()).mean() / 3
            place += length
        for parameter in objective.parameters.values():
            parameter.grad = None
        total.backward()
        assert loss == pytest.approx(total.item(), rel=1e-4)
        for name, parameter in objective.parameters.items():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_policy_starts_at_the_reference_and_its_reward_rises(tiny: Tiny, tmp_path: Path) -> None:
    """The first answers have a KL of 0; rewarded for one of the model's three styles, the policy takes it more often and moves away."""
    method = Reft(ReftOptions(warmup_epochs=0, learning_rate_ratio=1.0))
    samples = tiny.samples(method, judged_records(8))
    schedule = Schedule(batch=16, updates=6, learning_rate=4e-3)
    training = replace(
        tiny.training(method, tmp_path, schedule, 16), verifier=lambda output, _: output.startswith("Step"), max_new_tokens=6
    )
    seen: list[Rollout] = []
    with tiny.adapted() as model:
        objective = tiny.objective(model, samples, training, Reinforced)

        def progress(*_: object) -> None:
            if objective.rollout and (not seen or objective.rollout is not seen[-1]):
                seen.append(objective.rollout)

        optimize(model, objective, training, progress)
    assert len(seen) == 3  # two updates each
    assert seen[0].kl_B.tolist() == [0] * 16
    assert seen[-1].kl_B.abs().max() > 0
    assert seen[-1].reward_B.mean() - seen[0].reward_B.mean() >= 0.3


def test_value_head_reads_a_model_with_its_head_in_nf4(tiny_model: Path, tmp_path: Path) -> None:
    """The values have the width of the hidden states, however the output head is held."""
    tiny = Tiny(tiny_model, quantized_head=True)
    method = Reft(ReftOptions(warmup_epochs=0))
    samples = tiny.samples(method, judged_records(2))
    training = replace(tiny.training(method, tmp_path, Schedule(batch=2, updates=1)), max_new_tokens=6)
    with tiny.adapted() as model:
        objective = tiny.objective(model, samples, training, Reinforced)
        state, _ = optimize(model, objective, training, silent)
    assert state.updates == 1
    assert objective.parameters["value.weight"].shape == (1, model.config.hidden_size)


def test_updates_of_both_parts(tiny: Tiny, tmp_path: Path) -> None:
    """The warm-up comes on top of the schedule; its rate falls to zero before PPO's warms up; epochs are passes of PPO."""
    method = Reft(ReftOptions(warmup_epochs=1, learning_rate_ratio=0.1, inner_updates=2))
    samples = tiny.samples(method, judged_records(4))
    with tiny.adapted() as model:
        schedule = Schedule(batch=2, epochs=2, learning_rate=1e-3)
        objective = tiny.objective(model, samples, tiny.training(method, tmp_path, schedule), Reinforced)
        assert (objective.restart, objective.updates) == (2, 2 + 2 * 2 * 2)
        assert [u for u in range(objective.updates) if objective.ends_epoch(u)] == [5, 9]
        assert objective.learning_rate(0) == pytest.approx(1e-3)
        assert max(map(objective.learning_rate, range(2, 10))) == pytest.approx(1e-4)
        schedule = Schedule(batch=2, updates=5)
        assert tiny.objective(model, samples, tiny.training(method, tmp_path, schedule), Reinforced).updates == 2 + 5


def _arguments(tiny: Tiny, directory: Path) -> Any:
    """A warm-up of two updates, then three steps of PPO with two updates each."""
    method = Reft(ReftOptions(warmup_epochs=2, learning_rate_ratio=1.0))
    samples = tiny.samples(method, judged_records(2))
    directory.mkdir(exist_ok=True)
    schedule = Schedule(batch=2, updates=6, learning_rate=5e-3, checkpoint_s=0)
    return samples, replace(tiny.training(method, directory, schedule), max_new_tokens=16)


def _stop_while_sampling(done: int, total: int, tokens: int, loss: float | None, doing: str | None) -> None:
    if doing == "sample" and done == 4:
        raise Stopped


def test_killed_or_stopped_run_ends_in_the_same_adapter(tiny: Tiny, tmp_path: Path) -> None:
    """Killed in the warm-up and between two updates on the same answers, stopped while sampling: the same losses and adapter."""
    samples, training = _arguments(tiny, tmp_path / "whole")
    with tiny.adapted() as model:
        state, _ = optimize(model, tiny.objective(model, samples, training, Reinforced), training, silent)
        whole = adapter(model)
    assert state.updates == 2 + 6
    samples, training = _arguments(tiny, tmp_path / "killed")
    for error, listener in ((Killed, kill_after(1)), (Killed, kill_after(3)), (Stopped, _stop_while_sampling), (Killed, kill_after(6))):
        with tiny.adapted() as model, pytest.raises(error):
            optimize(model, tiny.objective(model, samples, training, Reinforced), training, listener)
    with tiny.adapted() as model:
        end, resumed = optimize(model, tiny.objective(model, samples, training, Reinforced), training, silent)
        assert resumed
        assert end == state
        assert all(torch.equal(tensor, whole[name]) for name, tensor in adapter(model).items())


def test_generation_keeps_the_end_only_where_it_is_asked_to(tiny: Tiny) -> None:
    """With `keep_end` an answer that ended has its end-of-sequence token; one that was cut off has none."""
    sample = tiny.samples(Reft(ReftOptions()), judged_records(1))[0]
    with tiny.adapted() as model:
        options = {"batch": 1, "progress": silent}
        [(without, ended)] = generate(model, tiny.tokenizer, [sample.prompts["base"]], max_new_tokens=120, **options)
        [(kept, _)] = generate(model, tiny.tokenizer, [sample.prompts["base"]], max_new_tokens=120, keep_end=True, **options)
        [(cut, cut_ended)] = generate(model, tiny.tokenizer, [sample.prompts["base"]], max_new_tokens=4, keep_end=True, **options)
    assert kept == [*without, tiny.tokenizer.eos_token_id]
    assert cut == without[:4]
    assert (ended, cut_ended) == (True, False)
