"""The optimizer loop: when references are taken, and that a run which was killed ends in the same adapter, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_training import Killed, Tiny, adapter, judged_records, kill_after

from edge_agent.dataset import Record
from edge_agent.errors import JobSchema
from edge_agent.job import Dataset, Evaluation, Job, Lora, NlftOptions, Schedule, SftOptions
from edge_agent.job_directory import JobDirectory
from edge_agent.new_options import CLUSTER, FIXED, NewOptions, change, check_change
from edge_agent.training.contexts import Sample
from edge_agent.training.live_options import LiveOptions
from edge_agent.training.loop import Training, order, starts_epoch
from edge_agent.training.methods.method import Scores
from edge_agent.training.methods.nlft import Nlft
from edge_agent.training.methods.sft import Sft
from edge_agent.training.prepare import prepare_files
from edge_agent.training.saliency_scores import Rescorings
from edge_agent.training.scoring import score

SCHEDULE = Schedule(batch=1, updates=5, learning_rate=5e-3, checkpoint_s=0)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Tiny:
    return Tiny(tiny_model)


@pytest.mark.parametrize(("references", "dropout"), [("live", 0.1), ("epoch", 0.1), ("epoch", 0.0), ("once", 0.1)])
def test_killed_run_ends_in_the_same_adapter(references: Any, dropout: float, tiny: Tiny, tmp_path: Path) -> None:
    """Killed twice and resumed, with dropout and whenever references are taken: the same losses, adapter and scores of each epoch."""
    lora = Lora(rank=4, dropout=dropout)
    method = Nlft(NlftOptions(references=references))
    samples = tiny.samples(method, judged_records(1))

    def training(directory: Path) -> Training:
        return replace(tiny.training(method, directory, SCHEDULE), rescored=Rescorings(directory, samples, epochs=2).add)

    with tiny.adapted(lora) as model:
        state, resumed = tiny.train(model, samples, training(_new(tmp_path / "whole")))
        whole = adapter(model)
    assert not resumed
    again = _new(tmp_path / "killed")
    for update in (1, 4):  # in the first epoch of three samples and within the second
        with tiny.adapted(lora) as model, pytest.raises(Killed):
            tiny.train(model, samples, training(again), kill_after(update))
    with tiny.adapted(lora) as model:
        end, resumed = tiny.train(model, samples, training(again))
        assert resumed
        assert end == state
        assert all(torch.equal(tensor, whole[name]) for name, tensor in adapter(model).items())
    kept, kept_again = (Rescorings(tmp_path / name, samples, epochs=2) for name in ("whole", "killed"))
    scored = [kept.of(i) for i in range(len(samples))]
    assert scored == [kept_again.of(i) for i in range(len(samples))]
    # Five updates are an epoch of three samples, and two of the next.
    assert Counter(s.epoch for of_sample in scored for s in of_sample) == {"live": {1: 3, 2: 2}, "epoch": {2: 3}, "once": {}}[references]


CHANGED = {"correct_threshold": 0.4, "correct_other_power": 3.0, "unlikelihood_scale": 9.0, "imitate_incorrect": True}
SENT = {1: {"judge_base_ratio": 0.5, "imitate_flagged_share": 1.0}, 4: CHANGED}
"""Fields of the options that come when so many updates are done."""


def _sending(directory: Path, own: NlftOptions, kill_at: int | None = None) -> Any:
    """Return a listener that lays down what comes while a run trains, and then may kill it."""

    def progress(done: int, total: int, tokens: int, loss: float | None, doing: str | None) -> None:
        if doing is None and done in SENT:
            JobDirectory(directory).write_options(NewOptions([*SENT].index(done) + 1, change(own, SENT[done])))
        if doing is None and done == kill_at:
            raise Killed

    return progress


@pytest.mark.parametrize(("checkpoint_s", "kills"), [(0.0, (2, 4)), (1e9, (3, 5))])
@pytest.mark.parametrize("references", ["live", "epoch", "once"])
def test_killed_run_takes_new_options_at_the_same_update(
    references: Any, checkpoint_s: float, kills: tuple[int, int], tiny: Tiny, tmp_path: Path
) -> None:
    """Killed before or after it has taken them, between two checkpoints or not: the same losses and adapter, bit for bit."""
    own, lora = NlftOptions(references=references), Lora(rank=4, dropout=0.1)
    method, told = Nlft(own), list[dict[str, Any]]()
    samples = tiny.samples(method, judged_records(1))
    schedule = msgspec.structs.replace(SCHEDULE, updates=6, checkpoint_s=checkpoint_s)

    def train(name: str, kill_at: int | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        live = LiveOptions(JobDirectory(directory), own, lambda kind, **fields: told.append({"kind": kind, **fields}))
        training = replace(tiny.training(method, directory, schedule), newer=live.newer, taken=live.taken)
        with tiny.adapted(lora) as model:
            state, resumed = tiny.train(model, samples, training, _sending(directory, own, kill_at))
            assert resumed == (name == "killed")
            return state, adapter(model)

    state, whole = train("whole")
    assert [(c.number, c.update, c.method) for c in state.changes] == [(1, 1, change(own, SENT[1])), (2, 4, change(own, SENT[4]))]
    assert told == [{"kind": "options_taken", "stage": "train", "number": n, "done": update} for n, update in ((1, 1), (2, 4))]
    for kill_at in kills:
        with pytest.raises(Killed):
            train("killed", kill_at)
    end, again = train("killed")
    assert end == state
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


@pytest.mark.parametrize(("references", "cluster"), [("live", "none"), ("epoch", "none"), ("once", "none"), ("live", "like")])
def test_options_that_come_before_training_are_those_of_another_job(references: Any, cluster: Any, tiny: Tiny, tmp_path: Path) -> None:
    """Taken before the first update, they give the adapter of a job that had them from the start, bit for bit, and not its own."""
    own = NlftOptions(references=references, cluster=cluster)
    other = change(own, CHANGED | ({"cluster": "none"} if cluster != "none" else {}))
    samples = tiny.samples(Nlft(own), judged_records(1))
    adapters = []
    for name, options, comes in (("own", own, False), ("new", own, True), ("other", other, False)):
        directory = JobDirectory(_new(tmp_path / name))
        if comes:
            directory.write_options(NewOptions(1, other))
        newer = LiveOptions(directory, own, lambda *_, **__: None).newer
        with tiny.adapted(moved=0.05) as model:
            tiny.train(model, samples, replace(tiny.training(Nlft(options), directory.path, SCHEDULE), newer=newer))
            adapters.append(adapter(model))
    same = [all(torch.equal(tensor, adapters[1][name]) for name, tensor in found.items()) for found in adapters]
    assert same == [False, True, True]


@pytest.mark.parametrize(
    ("own", "fields", "says"),
    [
        (NlftOptions(), {"references": "live"}, "method.references: it cannot change while a job runs: the run is planned"),
        (NlftOptions(), {"turning_ratio": 0.2}, "method.turning_ratio: it cannot change while a job runs: it decides"),
        (NlftOptions(), {"cluster": "like"}, "method.cluster: it cannot change while this job runs, which takes no hidden states"),
        (NlftOptions(cluster="like"), {"correct_threshold": 0.5}, 'has clusters, whose hidden states are kept only with references "live"'),
        (SftOptions(), {"correct_threshold": 0.5}, "the job does not train by nlft"),
    ],
)
def test_options_that_a_job_cannot_go_on_with_are_refused_once(own: Any, fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    """The run goes on as it is, and one event says why; what is no options at all is refused likewise, and what is good is taken."""
    directory, told = JobDirectory(tmp_path), list[tuple[str, int | None, str]]()
    live = LiveOptions(directory, own, lambda kind, stage, number, text: told.append((kind, number, text)))
    assert live.newer(0) is None
    nlft = own if isinstance(own, NlftOptions) else NlftOptions()
    directory.write_options(NewOptions(3, change(nlft, fields)))
    assert [live.newer(0), live.newer(0)] == [None, None]
    [(kind, number, text)] = told
    assert (kind, number) == ("options_refused", 3)
    assert says in text
    directory.options_file.write_text('{"number": 4, "method": {"name": "nlft", "correct_threshold": 1.5}}')
    assert [live.newer(0), live.newer(0)] == [None, None]
    assert told[1][:2] == ("options_refused", None)
    assert "$.method.correct_threshold" in told[1][2]
    assert len(told) == 2


def test_every_field_of_the_options_can_change_or_says_why_not() -> None:
    """A field is fixed, one of clusters, or can change in every job without clusters and, where scores are live, with them."""
    values: dict[str, Any] = {"cluster": "unlike", "imitate_incorrect": True}
    for name in NlftOptions.__struct_fields__:
        for own in (NlftOptions(), NlftOptions(references="live", cluster="like")):
            fixed = name in FIXED or (name in CLUSTER and own.cluster == "none")
            if name in FIXED:
                continue
            new = change(own, {name: values.get(name, 1 if name == "cluster_max_span" else 0.5)})
            with pytest.raises(JobSchema) if fixed else nullcontext():
                check_change(own, new)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("references", "epochs"), [("live", (1, 2, 3, 4)), ("epoch", (2, 4))])
def test_an_update_over_the_end_of_an_epoch_tells_both(
    references: Any, epochs: tuple[int, ...], dropout: float, tiny: Tiny, tmp_path: Path
) -> None:
    """A sample that an update holds twice is scored in two epochs, once in each context: none is missing, and none counts for another."""
    method, told = Nlft(NlftOptions(references=references)), list[tuple[int, int, str]]()
    samples = tiny.samples(method, judged_records(1))
    training = tiny.training(method, tmp_path, Schedule(batch=2 * len(samples) - 1, epochs=4))

    def listen(scored: Sequence[tuple[int, int, Scores]]) -> None:
        for epoch, sample, s in scored:
            logp = {"base": s.base_logp_T, "standard": s.standard_logp_T, "judge": s.judge_logp_T}
            told.extend((epoch, sample, context) for context, x_T in logp.items() if x_T is not None and not x_T.isnan().any())

    with tiny.adapted(Lora(rank=4, dropout=dropout)) as model:
        tiny.train(model, samples, replace(training, rescored=listen))
    assert Counter(told) == Counter(
        (epoch, n, context) for epoch in epochs for n, sample in enumerate(samples) for context in sample.prompts
    )


def test_an_epoch_is_not_scored_in_contexts_that_no_weight_depends_on(tiny: Tiny, tmp_path: Path) -> None:
    """Correct outputs weigh what the standard context says: their base context is the training pass's, and so are its numbers."""
    method, told = Nlft(NlftOptions(references="epoch")), list[tuple[int, int, Scores]]()
    samples = tiny.samples(method, judged_records(1))
    schedule = Schedule(batch=len(samples), epochs=2, learning_rate=1e-12)  # the adapter stays what it is
    training = replace(tiny.training(method, tmp_path, schedule), rescored=told.extend)
    with tiny.adapted(moved=0.05) as model:
        scored = dict(score(model, samples, 1, 64, tiny.tokenizer.pad_token_id, lambda *_: None))
        tiny.train(model, samples, training)
    of_epoch, of_pass = told[: len(samples)], told[len(samples) :]
    correct = {i for i, sample in enumerate(samples) if sample.target.kind == "correct"}
    assert {i for _, i, s in of_epoch if s.base_logp_T.isnan().all()} == correct == {i for _, i, _ in of_pass}
    assert len(of_pass) == len(correct)
    for _, i, s in of_pass:
        torch.testing.assert_close(s.base_logp_T, scored[i].base_logp_T, rtol=1e-4, atol=1e-5)


def _new(directory: Path) -> Path:
    directory.mkdir()
    return directory


class Recorded(Nlft):
    """NLFT that keeps every score it was given, by record and answer."""

    def __init__(self, options: NlftOptions) -> None:
        super().__init__(options)
        self.heard: list[tuple[str, torch.Tensor]] = []

    def weights(self, target: Any, scores: Any) -> Any:
        self.heard.append((f"{target.record.id} {target.text}", scores.base_logp_T))
        return super().weights(target, scores)


@pytest.mark.parametrize(("references", "times"), [("live", 1 + 2), ("epoch", 1 + 1), ("once", 1)])
def test_references_are_taken_when_the_option_says(references: Any, times: int, tiny: Tiny, tmp_path: Path) -> None:
    """In two epochs each answer is scored before training and then per update that it is in, per epoch after the first, or not again."""
    method = Recorded(NlftOptions(references=references, standard_answers=False))
    samples = tiny.samples(method, judged_records(2))
    schedule = Schedule(batch=2, epochs=2, learning_rate=5e-3)
    with tiny.adapted() as model:
        tiny.train(model, samples, tiny.training(method, tmp_path, schedule))
    by_answer: dict[str, list[torch.Tensor]] = {}
    for name, logp in method.heard:
        by_answer.setdefault(name, []).append(logp)
    assert len(by_answer) == len(samples)
    assert {len(scores) for scores in by_answer.values()} == {times}
    # The adapter has moved in between, so what was scored again is something else.
    assert all(not torch.equal(scores[0], scores[-1]) for scores in by_answer.values() if times > 1)


def test_an_epoch_starts_with_the_update_that_begins_in_it() -> None:
    """Three samples in batches of two: the second update takes the first sample of the next epoch, and the third begins in it."""
    schedule = Schedule(batch=2, epochs=4)
    batches = order(3, schedule, seed=0)
    assert len(batches) == 6
    assert sorted(batches[0] + batches[1][:1]) == [0, 1, 2]
    assert [u for u in range(6) if starts_epoch(u, 3, 2)] == [2, 3, 5]


def test_live_references_see_no_dropout(tiny: Tiny, tmp_path: Path) -> None:
    """Before the first update live scores are those of the score stage, bit for bit, although dropout is on in training."""
    method = Recorded(NlftOptions(references="live", standard_answers=False))
    samples = tiny.samples(method, judged_records(1))
    schedule = Schedule(batch=len(samples), updates=1)
    with tiny.adapted(Lora(rank=4, dropout=0.5), moved=0.05) as model:
        tiny.train(model, samples, tiny.training(method, tmp_path, schedule))
    before, live = dict(method.heard[:2]), dict(method.heard[2:])
    assert before.keys() == live.keys()
    assert all(torch.equal(logp, before[name]) for name, logp in live.items())


def _development(tiny: Tiny, count: int) -> list[Sample]:
    """Standard answers of questions that are not trained on."""
    return tiny.samples(Sft(SftOptions()), judged_records(count + 2)[4:])


def _development_loss(model: Any, development: list[Sample]) -> float:
    """Mean of -log b over all answer tokens, by the plain formula."""
    logps = []
    for sample in development:
        ids = torch.tensor([[*sample.prompts["base"], *sample.answer]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(sample.prompts["base"]) - 1 : -1].float()
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(sample.answer)[:, None])[:, 0])
    return -torch.cat(logps).mean().item()


# So high a rate that the loss rises again after an epoch or two.
SPOILING = Schedule(batch=2, epochs=6, learning_rate=5e-2, warmup=0.0, patience=2, checkpoint_s=0)


def test_early_stop_keeps_the_adapter_of_the_best_epoch(tiny: Tiny, tmp_path: Path) -> None:
    """Training ends `patience` epochs after the lowest development loss, and the adapter in the model is the one that had it."""
    method = Sft(SftOptions())
    samples, development = tiny.samples(method, judged_records(2)), _development(tiny, 2)
    training = replace(tiny.training(method, tmp_path, SPOILING), development=development)
    with tiny.adapted() as model:
        state, _ = tiny.train(model, samples, training)
        kept = _development_loss(model, development)
    best = min(range(len(state.development)), key=lambda e: state.development[e])
    assert len(state.development) == best + 1 + 2 < 6
    assert state.updates == len(state.development)  # two samples, so an epoch is one update
    assert state.kept == best + 1
    assert kept == pytest.approx(state.development[best], rel=1e-4)


def test_killed_run_stops_early_at_the_same_update(tiny: Tiny, tmp_path: Path) -> None:
    """Killed after an epoch that is better, after one that is worse and after the last one: the same choice, bit for bit."""
    method = Sft(SftOptions())
    samples, development = tiny.samples(method, judged_records(2)), _development(tiny, 2)
    with tiny.adapted() as model:
        state, _ = tiny.train(model, samples, replace(tiny.training(method, _new(tmp_path / "whole"), SPOILING), development=development))
        whole = adapter(model)
    training = replace(tiny.training(method, _new(tmp_path / "killed"), SPOILING), development=development)
    for update in (1, state.kept + 1, state.updates):
        with tiny.adapted() as model, pytest.raises(Killed):
            tiny.train(model, samples, training, kill_after(update))
    with tiny.adapted() as model:
        end, resumed = tiny.train(model, samples, training)
        assert resumed
        assert end == state
        assert all(torch.equal(tensor, whole[name]) for name, tensor in adapter(model).items())


def test_patience_without_development_questions_is_refused(tiny_model: Path) -> None:
    """There would be nothing to decide by."""
    job = Job(model=str(tiny_model), dataset=Dataset("0" * 64), budget_bytes=2**30, schedule=Schedule(patience=1))
    with pytest.raises(JobSchema, match="there is no development question"):
        prepare_files(job, judged_records(4), None)


def test_demonstrations_are_development_references_too(tiny_model: Path) -> None:
    """Of a question without a standard answer the outputs are measured that are not judged wrong, each once."""
    records = [Record(f"q{n}", None, f"text {n}", judgment, id=str(n)) for n in range(4) for judgment in (None, "It is rude.")]
    job = Job(
        model=str(tiny_model), dataset=Dataset("0" * 64), budget_bytes=2**30, method=SftOptions(targets="outputs"),
        schedule=Schedule(patience=1), evaluation=Evaluation(questions=0, development=0.5),
    )  # fmt: skip
    work = prepare_files(job, records, None)
    assert len(work.development) == 4
    assert {t.text for t in work.development_targets} == {r.output for r in work.development}
    assert len(work.development_targets) == 2


def test_without_patience_nothing_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    """Development records alone change nothing: every update is made and the last adapter is kept."""
    method = Sft(SftOptions())
    samples = tiny.samples(method, judged_records(2))
    schedule = msgspec.structs.replace(SPOILING, patience=None, epochs=2)
    with tiny.adapted() as model:
        state, _ = tiny.train(model, samples, replace(tiny.training(method, tmp_path, schedule), development=_development(tiny, 1)))
    assert (state.updates, state.development, state.kept) == (2, (), 0)
