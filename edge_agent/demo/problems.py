"""Seeded generator of worked word problems, of mistakes in their answers, and of three domains the tiny model has not seen.

A problem is composed, not listed: a start, up to two operations, an end, each in three wordings. Its worked answer is a list
of steps whose operands are numbers of the question or results of earlier steps, so a mistake in one step propagates to the
following ones as it does in a real wrong answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edge_agent.critic import judge_output

MAX_RESULT = 200

PEOPLE = {
    "Ana": "She", "Bea": "She", "Cleo": "She", "Dora": "She", "Emma": "She", "Fay": "She", "Gina": "She", "Hana": "She",
    "Iris": "She", "Jill": "She", "Adam": "He", "Ben": "He", "Carl": "He", "Dan": "He", "Eli": "He", "Finn": "He",
    "Gus": "He", "Hugo": "He", "Ivan": "He", "Jack": "He",
}  # fmt: skip
ITEMS = (
    "apples", "pears", "books", "coins", "cards", "pens", "cups", "stones", "shells", "stamps",
    "eggs", "marbles", "stickers", "balls", "plums", "beads",
)  # fmt: skip
STYLES = 3


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step, by its index."""

    step: int


@dataclass(frozen=True)
class Step:
    """One line of a worked answer: `subject` `left op right` `unit`; `slip` is added to the result by a mistake."""

    subject: str
    left: int | Ref
    op: str
    right: int | Ref
    unit: str
    slip: int = 0


@dataclass(frozen=True)
class Problem:
    """A question with the steps that answer it and the style its answer is written in."""

    question: str
    steps: tuple[Step, ...]
    style: int

    @property
    def answer(self) -> str:
        """The standard answer, worked, with its final line `#### n`."""
        return render(self.steps, self.style)


class Unusable(Exception):
    """A drawn problem has a result that is negative, fractional or too large; draw again."""


def results(steps: tuple[Step, ...]) -> list[tuple[int, int, int]]:
    """Return (left, right, result) of every step, or raise Unusable."""
    rows: list[tuple[int, int, int]] = []
    for step in steps:
        left, right = (rows[x.step][2] if isinstance(x, Ref) else x for x in (step.left, step.right))
        if step.op == "/" and (right == 0 or left % right):
            raise Unusable
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left // max(right, 1)}[step.op] + step.slip
        if not 0 <= value <= MAX_RESULT:
            raise Unusable
        rows.append((left, right, value))
    return rows


def render(steps: tuple[Step, ...], style: int) -> str:
    """Write the worked answer of `steps` in one of the three styles."""
    lines = []
    value = 0
    for number, (step, (left, right, value)) in enumerate(zip(steps, results(steps), strict=True), start=1):
        equation = f"<<{left}{step.op}{right}={value}>>{value} {step.unit}."
        lead = (f"{step.subject} {equation}", f"{step.subject.split()[0]}: {equation}", f"Step {number}: {step.subject} {equation}")
        lines.append(lead[style])
    return "\n".join([*lines, f"#### {value}"])


class _Draft:
    """Sentences and steps while a problem is being composed; `current` is what the main person has now."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sentences: list[str] = []
        self.steps: list[Step] = []
        self.name, self.other, self.third = rng.sample(sorted(PEOPLE), 3)
        self.item = rng.choice(ITEMS)
        self.current: int | Ref = 0

    def value(self) -> int:
        return results(tuple(self.steps))[self.current.step][2] if isinstance(self.current, Ref) else self.current

    def say(self, *wordings: str) -> None:
        self.sentences.append(self.rng.choice(wordings))

    def work(self, subject: str, left: int | Ref, op: str, right: int | Ref, unit: str | None = None) -> Ref:
        self.steps.append(Step(subject, left, op, right, unit or self.item))
        return Ref(len(self.steps) - 1)

    def finish(self) -> Problem:
        results(tuple(self.steps))
        if not self.steps:
            raise Unusable
        return Problem(" ".join(self.sentences), tuple(self.steps), self.rng.randrange(STYLES))


def _start(d: _Draft) -> None:
    if d.rng.random() < 0.65:
        d.current = d.rng.randint(2, 60)
        d.say(
            f"{d.name} has {d.current} {d.item}.",
            f"{d.name} starts with {d.current} {d.item}.",
            f"There are {d.current} {d.item} on the desk of {d.name}.",
        )
        return
    boxes, each = d.rng.randint(2, 9), d.rng.randint(2, 12)
    d.say(
        f"{d.name} has {boxes} boxes with {each} {d.item} each.",
        f"{d.name} has {boxes} boxes. Each box holds {each} {d.item}.",
        f"There are {each} {d.item} in each of the {boxes} boxes of {d.name}.",
    )
    d.current = d.work(f"{d.name} has", boxes, "*", each)


def _get(d: _Draft) -> None:
    n = d.rng.randint(2, 40)
    d.say(f"{PEOPLE[d.name]} gets {n} more {d.item}.", f"Then {d.name} finds {n} {d.item}.", f"A friend gives {d.name} {n} {d.item}.")
    d.current = d.work(f"{d.name} has", d.current, "+", n)


def _lose(d: _Draft) -> None:
    n = d.rng.randint(1, 30)
    d.say(f"{PEOPLE[d.name]} loses {n} {d.item}.", f"Then {d.name} sells {n} {d.item}.", f"{d.name} gives away {n} of them.")
    d.current = d.work(f"{d.name} has", d.current, "-", n)


def _give_each(d: _Draft) -> None:
    each, friends = d.rng.randint(2, 6), d.rng.randint(2, 6)
    d.say(
        f"{PEOPLE[d.name]} gives {each} {d.item} to each of {friends} friends.",
        f"Then {friends} friends get {each} {d.item} each from {d.name}.",
        f"{d.name} hands {each} {d.item} to every one of {friends} friends.",
    )
    given = d.work("That is", each, "*", friends)
    d.current = d.work(f"{d.name} has", d.current, "-", given)


def _more_boxes(d: _Draft) -> None:
    boxes, each = d.rng.randint(2, 6), d.rng.randint(2, 9)
    d.say(
        f"{PEOPLE[d.name]} buys {boxes} boxes of {each} {d.item}.",
        f"Then {d.name} gets {boxes} boxes with {each} {d.item} each.",
        f"{d.name} finds {boxes} bags of {each} {d.item}.",
    )
    bought = d.work("That is", boxes, "*", each)
    d.current = d.work(f"{d.name} has", d.current, "+", bought)


def _times(d: _Draft) -> None:
    k = d.rng.randint(2, 4)
    d.say(
        f"Then the {d.item} become {k} times as many.",
        f"A week later {d.name} has {k} times as many {d.item}.",
        f"Now {PEOPLE[d.name].lower()} has {k} times that number.",
    )
    d.current = d.work(f"{d.name} has", d.current, "*", k)


def _share(d: _Draft) -> None:
    value = d.value()
    divisors = [k for k in range(2, 7) if value >= k and value % k == 0]
    if not divisors:
        raise Unusable
    k = d.rng.choice(divisors)
    d.say(
        f"{PEOPLE[d.name]} puts them into {k} equal piles and keeps one.",
        f"Then {d.name} shares them among {k} people and keeps one share.",
        f"{d.name} splits them equally into {k} bags and keeps one bag.",
    )
    d.current = d.work(f"{d.name} has", d.current, "/", k)


OPERATIONS = (_get, _lose, _give_each, _more_boxes, _times, _share)


def _end_how_many(d: _Draft) -> None:
    d.say(
        f"How many {d.item} does {d.name} have now?",
        f"How many {d.item} are there now?",
        f"What number of {d.item} does {d.name} have at the end?",
    )


def _end_times(d: _Draft) -> None:
    k = d.rng.randint(2, 5)
    d.say(f"{d.other} has {k} times as many {d.item} as {d.name}.")
    d.work(f"{d.other} has", d.current, "*", k)
    _ask_other(d)


def _compare(d: _Draft, other: str, than: str, current: int | Ref) -> Ref:
    """One sentence that `other` has more or fewer than `than`, and its step."""
    n, more = d.rng.randint(2, 30), d.rng.random() < 0.5
    word = "more" if more else "fewer"
    d.say(
        f"{other} has {n} {word} {d.item} than {than}.",
        f"{other} has {n} {word} than {than}.",
        f"Compared with {than}, {other} has {n} {word} {d.item}.",
    )
    return d.work(f"{other} has", current, "+" if more else "-", n)


def _end_compare(d: _Draft) -> None:
    _compare(d, d.other, d.name, d.current)
    _ask_other(d)


def _ask_other(d: _Draft, other: str | None = None) -> None:
    other = other or d.other
    d.say(f"How many {d.item} does {other} have?", f"How many {d.item} are with {other}?", f"What number of {d.item} does {other} have?")


def _end_together(d: _Draft) -> None:
    n = d.rng.randint(2, 60)
    d.say(f"{d.other} has {n} {d.item}.", f"{d.other} has {n} of them too.", f"There are also {n} {d.item} with {d.other}.")
    d.say(
        f"How many {d.item} do they have together?",
        f"How many {d.item} are there in all?",
        f"What number of {d.item} do {d.name} and {d.other} have together?",
    )
    d.work("Together they have", d.current, "+", n)


def _end_price(d: _Draft) -> None:
    price = d.rng.randint(2, 9)
    d.say(f"Each one costs {price} dollars.", f"The price of one is {price} dollars.", f"{d.name} sells each for {price} dollars.")
    d.say(
        "How many dollars are they worth?",
        f"What is the price of all the {d.item} in dollars?",
        f"How many dollars do all the {d.item} cost?",
    )
    d.work("They cost", d.current, "*", price, "dollars")


def _end_how_many_more(d: _Draft) -> None:
    n = d.value() + d.rng.randint(1, 60)
    d.say(f"{d.other} has {n} {d.item}.", f"{d.other} has {n} of them.", f"There are also {n} {d.item} with {d.other}.")
    d.say(f"How many more {d.item} does {d.other} have than {d.name}?", f"How many {d.item} more than {d.name} does {d.other} have?")
    d.work(f"{d.other} has", n, "-", d.current, f"more {d.item}")


ENDS = (_end_how_many, _end_times, _end_compare, _end_compare, _end_together, _end_price, _end_how_many_more)


def _seen(d: _Draft) -> None:
    """The family the tiny model is trained on."""
    _start(d)
    for _ in range(d.rng.choice((0, 1, 1, 2))):
        d.rng.choice(OPERATIONS)(d)
    d.rng.choice(ENDS)(d)


def _chain(d: _Draft) -> None:
    """Two comparisons one after the other: C against B, B against A."""
    _start(d)
    second = _compare(d, d.other, d.name, d.current)
    _compare(d, d.third, d.other, second)
    _ask_other(d, d.third)


def _distractor(d: _Draft) -> None:
    """A second person whose number the question does not need, before a comparison or a multiple."""
    _start(d)
    _bystander(d)
    d.rng.choice((_end_compare, _end_times))(d)


def _bystander(d: _Draft) -> None:
    n = d.rng.randint(2, 60)
    d.say(f"{d.third} has {n} {d.item}.", f"{d.third} has {n} of them too.", f"There are also {n} {d.item} with {d.third}.")


def _reversed(d: _Draft) -> None:
    """Half of the comparisons are told the other way round: A's number is given against B's."""
    _start(d)
    if d.rng.random() < 0.5:
        _end_compare(d)
        return
    n, more = d.rng.randint(2, 30), d.rng.random() < 0.5
    word = "more" if more else "fewer"
    d.say(
        f"That is {n} {word} {d.item} than {d.other} has.",
        f"That is {n} {word} than {d.other}.",
        f"This is {n} {word} {d.item} than {d.other} has.",
    )
    d.work(f"{d.other} has", d.current, "-" if more else "+", n)
    _ask_other(d)


FAMILIES: dict[str, Callable[[_Draft], None]] = {"seen": _seen, "chain": _chain, "distractor": _distractor, "reversed": _reversed}


def draw(family: str, rng: random.Random) -> Problem:
    """Draw one problem of a family whose results are all whole numbers from 0 to 200."""
    while True:
        draft = _Draft(rng)
        try:
            FAMILIES[family](draft)
            return draft.finish()
        except Unusable:
            continue


def problems(family: str, seed: int) -> Iterator[Problem]:
    """Yield distinct problems of a family for ever, the same ones for the same seed."""
    rng = random.Random(f"{family}/{seed}")
    seen: set[str] = set()
    while True:
        problem = draw(family, rng)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


# Mistakes -----------------------------------------------------------------------------------------------------------


def _wrong_operator(steps: list[Step], i: int, rng: random.Random) -> list[Step]:
    other = rng.choice({"+": "-*", "-": "+", "*": "+", "/": "-*"}[steps[i].op])
    return [*steps[:i], replace(steps[i], op=other), *steps[i + 1 :]]


def _wrong_operand(steps: list[Step], i: int, rng: random.Random) -> list[Step]:
    numbers = sorted({x for s in steps for x in (s.left, s.right) if isinstance(x, int)} | {rng.randint(2, 60)})
    side = rng.choice(("left", "right"))
    choice = rng.choice(numbers)
    changed = replace(steps[i], left=choice) if side == "left" else replace(steps[i], right=choice)
    return [*steps[:i], changed, *steps[i + 1 :]]


def _slip(steps: list[Step], i: int, rng: random.Random) -> list[Step]:
    return [*steps[:i], replace(steps[i], slip=rng.choice((-10, -2, -1, 1, 2, 10))), *steps[i + 1 :]]


def _stops_early(steps: list[Step], i: int, rng: random.Random) -> list[Step]:
    return steps[: max(i, 1)]


def _skipped_step(steps: list[Step], i: int, rng: random.Random) -> list[Step]:
    def moved(x: int | Ref) -> int | Ref:
        if not isinstance(x, Ref) or x.step < i:
            return x
        return steps[i].left if x.step == i else Ref(x.step - 1)

    rest = [replace(s, left=moved(s.left), right=moved(s.right)) for s in steps[i + 1 :]]
    return [*steps[:i], *rest]


MISTAKES = (_wrong_operator, _wrong_operand, _slip, _stops_early, _skipped_step)


def with_mistake(problem: Problem, rng: random.Random) -> Problem:
    """Return the problem with one mistake in its steps that changes the final result, in a style of its own."""
    right = results(problem.steps)[-1][2]
    while True:
        i = rng.randrange(len(problem.steps))
        try:
            steps = tuple(rng.choice(MISTAKES)(list(problem.steps), i, rng))
            if steps and results(steps)[-1][2] != right:
                return Problem(problem.question, steps, rng.randrange(STYLES))
        except Unusable:
            continue


def judged_mistake(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """Return a wrong output for the problem and the critic's judgment of it."""
    output = with_mistake(problem, rng).answer
    return output, judge_output(output, problem.answer)
