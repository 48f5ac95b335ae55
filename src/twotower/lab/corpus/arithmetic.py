"""Word problems of one to three steps over + - and small *, worked out step by step.

A step splits its numbers into tens and ones (17 + 25 = 30 + 12 = 42), so that no digit needs a
carry from digits to its right that are not written yet. The key holds the numbers and operations
only, commutative operands sorted: a test problem is never a training problem with other names.
"""

from collections.abc import Callable
from random import Random

from twotower.lab.corpus.document import MEN, NAMES, THINGS, Draft

Step = tuple[int, str, int]  # left, operator, right
Problem = tuple[str, list[Step]]  # question text, steps

MAX_VALUE = 300  # larger running totals would need a carry into the hundreds that tens hide


def apply_step(step: Step) -> int:
    """Return the value of one step."""
    left, operator, right = step
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def write_step(step: Step) -> str:
    """Write a step with its result, adding tens and ones apart where there are both."""
    left, operator, right = step
    result = apply_step(step)
    head = f"{left} {operator} {right} ="
    if operator == "*":
        if left <= 10 or left % 10 == 0:
            return f"{head} {result}."
        return f"{head} {(left - left % 10) * right} + {left % 10 * right} = {result}."
    if max(left, right) < 10 or left % 10 == right % 10 == 0:
        return f"{head} {result}."
    sign = 1 if operator == "+" else -1
    ones = left % 10 + sign * (right % 10)
    split = f"{result - ones} {'+' if ones >= 0 else '-'} {abs(ones)}"
    return f"{head} {result}." if head == f"{split} =" else f"{head} {split} = {result}."


def key_of(steps: list[Step]) -> str:
    """Return the semantic key of a problem: its steps without names, + and * operands sorted."""
    parts = []
    for left, operator, right in steps:
        if operator != "-":
            left, right = sorted((left, right))
        parts.append(f"{left}{operator}{right}")
    return ";".join(parts)


def _number(rng: Random) -> int:
    """Draw an operand: mostly two digits, so that carries and borrows are common."""
    return rng.randint(2, 20) if rng.random() < 0.3 else rng.randint(10, 99)


def _change(rng: Random, total: int) -> Step:
    """Draw a step that adds to the total or takes from it, staying within 1 and MAX_VALUE."""
    amount = _number(rng)
    if total > amount and (rng.random() < 0.5 or total + amount > MAX_VALUE):
        return (total, "-", amount)
    if total + amount > MAX_VALUE:
        return (total, "-", rng.randint(2, total - 1))
    return (total, "+", amount)


def _changes(rng: Random, first: int, count: int) -> list[Step]:
    steps: list[Step] = []
    total = first
    for _ in range(count):
        steps.append(_change(rng, total))
        total = apply_step(steps[-1])
    return steps


def _factors(rng: Random) -> tuple[int, int]:
    """Return a two-digit or one-digit number and a factor from 2 to 9."""
    return (rng.randint(2, 10) if rng.random() < 0.6 else rng.randint(11, 30)), rng.randint(2, 9)


def _join(clauses: list[str]) -> str:
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)


def _bare(rng: Random) -> Problem:
    if rng.random() < 0.25:
        left, right = _factors(rng)
        step: Step = (left, "*", right)
    else:
        step = _change(rng, _number(rng))
    left, operator, right = step
    form = rng.choice(("What is {}?", "Calculate {}.", "How much is {}?"))
    return form.format(f"{left} {operator} {right}"), [step]


def _owner(rng: Random) -> Problem:
    name, friend = rng.sample(NAMES, 2)
    things, pronoun = rng.choice(THINGS), "He" if name in MEN else "She"
    steps = _changes(rng, _number(rng), rng.choice((1, 1, 2, 2, 2, 3)))
    clauses = []
    for _, operator, amount in steps:
        gains = (f"buys {amount} more", f"finds {amount} more", f"gets {amount} from {friend}")
        losses = (f"gives {amount} to {friend}", f"loses {amount}", f"sells {amount}")
        clauses.append(rng.choice(gains if operator == "+" else losses))
    question = rng.choice(
        (
            f"How many {things} does {name} have now?",
            f"How many {things} does {pronoun.lower()} have?",
            f"How many {things} are left?" if steps[-1][1] == "-" else f"How many {things} now?",
        )
    )
    return f"{name} has {steps[0][0]} {things}. {pronoun} {_join(clauses)}. {question}", steps


def _place(rng: Random) -> Problem:
    steps = _changes(rng, _number(rng), rng.choice((1, 2, 2)))
    place, what, gain, loss = rng.choice(
        (
            ("on a bus", "people", "get on", "get off"),
            ("in a room", "people", "come in", "go out"),
            ("in a park", "birds", "fly in", "fly away"),
            ("on a farm", "cows", "are bought", "are sold"),
            ("in a box", rng.choice(THINGS), "are put in", "are taken out"),
        )
    )
    clauses = [f"{amount} {gain if sign == '+' else loss}" for _, sign, amount in steps]
    start = f"There are {steps[0][0]} {what} {place}."
    return f"{start} {_join(clauses)}. How many {what} are there now?", steps


def _two_owners(rng: Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    things, count, other = rng.choice(THINGS), _number(rng), _number(rng)
    start = f"{first} has {count} {things}."
    if rng.random() < 0.5:
        question = f"How many {things} do they have together?"
        return f"{start} {second} has {other}. {question}", [(count, "+", other)]
    step: Step = (count, "-", other) if count > other + 1 else (count, "+", other)
    word = "fewer" if step[1] == "-" else "more"
    start = f"{start} {second} has {other} {word} than {first}."
    if rng.random() < 0.4:
        return f"{start} How many {things} does {second} have?", [step]
    total: Step = (count, "+", apply_step(step))
    return f"{start} How many {things} do they have together?", [step, total]


def _boxes(rng: Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    pronoun = "He" if name in MEN else "She"
    size, count = _factors(rng)
    box = rng.choice(("boxes", "bags", "packs"))
    steps: list[Step] = [(size, "*", count)]
    text = f"{name} has {count} {box} of {size} {things}."
    if rng.random() < 0.6:
        step = _change(rng, size * count)
        text += f" {pronoun} {'buys' if step[1] == '+' else 'uses'} {step[2]}"
        text += " more." if step[1] == "+" else " of them."
        steps.append(step)
    return f"{text} How many {things} does {name} have?", steps


def _price(rng: Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    price, count = rng.randint(2, 10), rng.randint(2, 9)
    cost = price * count
    text = f"{name} buys {count} {things} for {price} dollars each"
    if rng.random() < 0.4:
        return f"{text}. How much does {name} pay?", [(price, "*", count)]
    paid = rng.randint(cost + 1, 99) if cost < 98 and rng.random() < 0.5 else 100
    text = f"{text} and pays with {paid} dollars. How much change does {name} get?"
    return text, [(price, "*", count), (paid, "-", cost)]


KINDS: tuple[Callable[[Random], Problem], ...] = (
    _bare, _bare, _bare, _owner, _owner, _owner, _owner, _place, _two_owners, _boxes, _price,
)  # fmt: skip


def draw(rng: Random) -> Draft:
    """Draw one problem; the answer holds the final number and every step with its result."""
    question, steps = rng.choice(KINDS)(rng)
    final = apply_step(steps[-1])
    worked = " ".join(write_step(step) for step in steps)
    return Draft(
        key=key_of(steps),
        prompt=f"Q: {question}\nA:",
        completion=f" {worked} The answer is {final}.",
        answer=lambda: {
            "final": final,
            "steps": [
                {"expression": f"{step[0]} {step[1]} {step[2]}", "result": apply_step(step)}
                for step in steps
            ],
        },
    )
