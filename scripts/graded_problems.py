"""Writes the graded problems that ship with the package, and computes every answer.

    python scripts/graded_problems.py            # backtrack_jax/data/graded.jsonl
    python scripts/graded_problems.py --check    # says whether that file is what this script writes

60 problems each of mathematics, deduction and planning, 20 at each of three difficulties. Mathematics is computed by
brute force, deduction by going through all possible worlds (only problems with one answer are kept), planning by
breadth-first search or by trying all orders. Difficulty is the size of the problem: numbers, people, moves.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

OUT = Path(__file__).parents[1] / "backtrack_jax" / "data" / "graded.jsonl"
PER_CELL = 20
NAMES: tuple[str, ...] = ("Ada", "Ben", "Cleo", "Dev", "Edda", "Finn", "Gus", "Hana", "Ivo", "Jun")

Made = tuple[str, str] | None
"""Text and answer; None where the drawn numbers give no problem with one answer, and others are drawn."""
Template = Callable[[random.Random, int], Made]


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def fewest(start: Hashable, steps: Callable[[Hashable], Iterable[Hashable]], done: Callable[[Hashable], bool]) -> int:
    """Number of steps to the nearest state that is done, by breadth-first search; -1 if none can be reached."""
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        state, n = queue.popleft()
        if done(state):
            return n
        for following in steps(state):
            if following not in seen:
                seen.add(following)
                queue.append((following, n + 1))
    return -1


# Mathematics.


def power_remainder(rng: random.Random, level: int) -> Made:
    a, b, m = rng.randint(3, 9), rng.randint(5, 8) * 3 ** (level - 1), rng.randint(7, 13 + 30 * (level - 1))
    return f"What is the remainder when {a}^{b} is divided by {m}? Answer with a number.", str(pow(a, b, m))


def divisible(rng: random.Random, level: int) -> Made:
    a, b, c = rng.sample([2, 3, 4, 5, 6, 7, 9, 10], 3)
    top = rng.choice((60, 80, 100)) * 4 ** (level - 1)
    if level == 1:
        n = sum(i % a == 0 or i % b == 0 for i in range(1, top + 1))
        rule = f"divisible by {a} or by {b} (or by both)"
    elif level == 2:
        n = sum((i % a == 0 or i % b == 0) and i % c != 0 for i in range(1, top + 1))
        rule = f"divisible by {a} or by {b}, but not by {c}"
    else:
        n = sum((i % a == 0) + (i % b == 0) + (i % c == 0) == 1 for i in range(1, top + 1))
        rule = f"divisible by exactly one of {a}, {b} and {c}"
    return f"How many whole numbers from 1 to {top} are {rule}? Answer with a number.", str(n)


def coins(rng: random.Random, level: int) -> Made:
    values = sorted(rng.sample([2, 3, 5, 7, 10, 11], level + 1))
    total = rng.randint(15, 25) * level
    ways = [1] + [0] * total
    for value in values:
        for i in range(value, total + 1):
            ways[i] += ways[i - value]
    if not ways[total]:
        return None
    text = f"A country has coins worth {listed([str(v) for v in values])} cents. In how many ways can exactly {total} "
    return text + "cents be paid, if only the number of each coin matters? Answer with a number.", str(ways[total])


def seats(rng: random.Random, level: int) -> Made:
    people = rng.sample(NAMES, 3 + level)
    a, b, c, d = (*people[:3], people[3] if level > 1 else "")
    rules = [lambda p: abs(p.index(a) - p.index(b)) != 1, lambda p: p.index(c) != 0]
    said = [f"{a} and {b} must not stand next to each other", f"{c} must not stand first"]
    if level > 1:
        rules.append(lambda p: p.index(d) < p.index(a))
        said.append(f"{d} must stand somewhere before {a}")
    n = sum(all(rule(p) for rule in rules) for p in itertools.permutations(people))
    text = f"{listed(people)} stand in a line for a photograph. {'; '.join(said)}."
    return f"{text} In how many orders can they stand? Answer with a number.", str(n)


def recurrence(rng: random.Random, level: int) -> Made:
    x, y, a, b, n = *(rng.randint(1, 5) for _ in range(4)), 4 + 2 * level
    terms = [x, y]
    while len(terms) < n:
        terms.append(a * terms[-1] + (b * terms[-2] if level > 1 else b))
    rule = f"{a} times the term before it plus {b}" + (" times the term before that" if level > 1 else "")
    text = f"A sequence begins {x}, {y}, and from the third on each term is {rule}. What is its term number {n}?"
    return f"{text} Answer with a number.", str(terms[-1])


def dice(rng: random.Random, level: int) -> Made:
    sides = [rng.choice((4, 6, 8)) for _ in range(1 + level)]
    total = rng.randint(len(sides) + 1, sum(sides) - 2)
    rolls = list(itertools.product(*(range(1, side + 1) for side in sides)))
    chance = Fraction(sum(sum(roll) == total for roll in rolls), len(rolls))
    named = listed([f"a die with {side} sides" for side in sides])
    text = f"You roll {named}, each numbered from 1. What is the probability that the numbers add up to {total}?"
    return f"{text} Answer with a fraction in lowest terms.", f"{chance.numerator}/{chance.denominator}"


def bells(rng: random.Random, level: int) -> Made:
    periods = rng.sample(range(4, 10 + 5 * level), 1 + level)
    together = math.lcm(*periods)
    if together > 4000 or together == max(periods):
        return None
    hours = rng.randint(2, 6)
    text = f"Bells ring every {listed([str(p) for p in periods])} minutes, and all have just rung together."
    again = sum(minute % together == 0 for minute in range(1, hours * 60 * level + 1))
    if level == 1:
        return f"{text} After how many minutes do they ring together again? Answer with a number.", str(together)
    span = f"in the {hours * level} hours from now, the last minute included"
    return f"{text} How often do they all ring together {span}, not counting now? Answer with a number.", str(again)


def polygon(rng: random.Random, level: int) -> Made:
    n = 2 + level
    points = [(rng.randint(0, 12), rng.randint(0, 12)) for _ in range(n)]
    middle = (sum(x for x, _ in points) / n, sum(y for _, y in points) / n)
    angles = [math.atan2(y - middle[1], x - middle[0]) for x, y in points]
    if len(set(points)) < n or min(abs(a - b) for a, b in itertools.combinations(angles, 2)) < 0.3:
        return None
    points = [point for _, point in sorted(zip(angles, points, strict=True))]
    twice = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))
    corners = listed([f"({x}, {y})" for x, y in points])
    return f"What is the area of the polygon with the corners {corners}, in this order? Answer with a number.", (
        str(Fraction(twice, 2).numerator) if twice % 2 == 0 else f"{twice / 2:.1f}"
    )


def digits(rng: random.Random, level: int) -> Made:
    total, low = rng.randint(5, 9 + 3 * level), 10**level
    found = [i for i in range(low, 10 * low) if sum(map(int, str(i))) == total and str(i)[0] != str(i)[-1]]
    text = f"How many numbers with {level + 1} digits have the digit sum {total} and a first digit other than the last?"
    return f"{text} Answer with a number.", str(len(found))


# Deduction: all possible worlds are tried.


def queue_order(rng: random.Random, level: int) -> Made:
    people = rng.sample(NAMES, 2 + 2 * level - (level == 3))
    truth = people[:]
    rng.shuffle(truth)
    clues: list[tuple[str, Callable[[Sequence[str]], bool]]] = []
    for a, b in itertools.permutations(people, 2):
        i, j = truth.index(a), truth.index(b)
        if j == i + 1:
            clues.append((f"{a} stands directly in front of {b}", lambda p, a=a, b=b: p.index(b) == p.index(a) + 1))
        if i < j:
            clues.append((f"{a} stands somewhere in front of {b}", lambda p, a=a, b=b: p.index(a) < p.index(b)))
        if j - i > 1:
            clues.append(
                (f"{a} and {b} do not stand next to each other", lambda p, a=a, b=b: abs(p.index(a) - p.index(b)) > 1)
            )
    rng.shuffle(clues)
    worlds, kept = list(itertools.permutations(people)), []
    for text, holds in clues:
        left = [world for world in worlds if holds(world)]
        if len(left) < len(worlds):
            worlds, kept = left, [*kept, text]
        if len(worlds) == 1:
            break
    if len(worlds) > 1 or len(kept) > 3 + 2 * level:
        return None
    place = rng.randrange(len(people))
    order = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")[place]
    text = f"{listed(sorted(people))} stand in a queue. {'. '.join(kept)}. Who is {order} in the queue?"
    return f"{text} Answer with a name.", truth[place]


def knights(rng: random.Random, level: int) -> Made:
    people = rng.sample(NAMES, 1 + level)
    said: list[tuple[str, Callable[[dict[str, bool]], bool]]] = []
    for person in people:
        other, third = rng.choice([p for p in people if p != person]), rng.choice(people)
        number = rng.randint(0, len(people))
        said.append(
            rng.choice(
                (
                    (f"{other} is a knave", lambda w, o=other: not w[o]),
                    (f"{other} is a knight", lambda w, o=other: w[o]),
                    (f"exactly {number} of us are knights", lambda w, n=number: sum(w.values()) == n),
                    (f"{other} and I are of the same kind", lambda w, o=other, p=person: w[o] == w[p]),
                    (
                        f"at least one of {other} and {third} is a knave",
                        lambda w, o=other, t=third: not (w[o] and w[t]),
                    ),
                )
            )
        )
    worlds = [dict(zip(people, kinds, strict=True)) for kinds in itertools.product((True, False), repeat=len(people))]
    left = [w for w in worlds if all(w[p] == claim(w) for p, (_, claim) in zip(people, said, strict=True))]
    if len(left) != 1:
        return None
    words = " ".join(f"{p} says: “{text[0].upper()}{text[1:]}.”" for p, (text, _) in zip(people, said, strict=True))
    text = f"On an island knights always tell the truth and knaves always lie. You meet {listed(people)}. {words}"
    return f"{text} How many of them are knights? Answer with a number.", str(sum(left[0].values()))


def pets(rng: random.Random, level: int) -> Made:
    n = 2 + level if level < 3 else 4
    people, animals = rng.sample(NAMES, n), rng.sample(("cat", "dog", "parrot", "snake", "horse"), n)
    colours = rng.sample(("red", "blue", "green", "white", "yellow"), n) if level > 1 else []
    truth = (dict(zip(people, animals, strict=True)), dict(zip(people, colours, strict=True)) if colours else {})
    clues: list[tuple[str, Callable[..., bool]]] = []
    for person in people:
        for animal in animals:
            if truth[0][person] != animal:
                clues.append((f"{person} does not own the {animal}", lambda o, c, p=person, a=animal: o[p] != a))
        for colour in colours:
            animal = truth[0][person]
            if truth[1][person] == colour:
                text = f"whoever lives in the {colour} house owns the {animal}"
                clues.append((text, lambda o, c, a=animal, k=colour: any(c[p] == k and o[p] == a for p in o)))
            else:
                clues.append(
                    (f"{person} does not live in the {colour} house", lambda o, c, p=person, k=colour: c[p] != k)
                )
    rng.shuffle(clues)
    worlds = [
        (dict(zip(people, a, strict=True)), dict(zip(people, b, strict=True)) if colours else {})
        for a in itertools.permutations(animals)
        for b in (itertools.permutations(colours) if colours else [()])
    ]
    kept = []
    for text, holds in clues:
        left = [world for world in worlds if holds(*world)]
        if len(left) < len(worlds):
            worlds, kept = left, [*kept, text]
        if len(worlds) == 1:
            break
    if len(worlds) > 1:
        return None
    owner, animal = rng.choice(list(truth[0].items()))
    houses = f" Their houses are {listed(sorted(colours))}, one for each." if colours else ""
    head = f"{listed(sorted(people))} each own one animal: {listed([f'a {a}' for a in sorted(animals)])}.{houses} "
    body = ". ".join(text[0].upper() + text[1:] for text in kept)
    return f"{head}{body}. Who owns the {animal}? Answer with a name.", owner


def boxes(rng: random.Random, level: int) -> Made:
    colours = rng.sample(("red", "blue", "green", "black", "white"), 2 + level)
    true = rng.randint(1, max(1, level - 1))
    claims: list[tuple[str, Callable[[str], bool]]] = []
    for colour in colours:
        other = rng.choice([c for c in colours if c != colour])
        pair = rng.sample(colours, 2)
        claims.append(
            rng.choice(
                (
                    ("The key is in this box", lambda at, c=colour: at == c),
                    ("The key is not in this box", lambda at, c=colour: at != c),
                    (f"The key is in the {other} box", lambda at, o=other: at == o),
                    (f"The key is not in the {other} box", lambda at, o=other: at != o),
                    (f"The key is in the {pair[0]} or the {pair[1]} box", lambda at, p=tuple(pair): at in p),
                )
            )
        )
    places = [at for at in colours if sum(claim(at) for _, claim in claims) == true]
    if len(places) != 1 or len({text for text, _ in claims}) < len(claims) - 1:
        return None
    words = " ".join(f"On the {c} box: “{text}.”" for c, (text, _) in zip(colours, claims, strict=True))
    number = {1: "Exactly one of these sentences is true", 2: "Exactly two of these sentences are true"}[true]
    text = (
        f"A key lies in one of {len(colours)} boxes. {words} {number}. Which box holds the key? Answer with a colour."
    )
    return text, places[0]


def heavier(rng: random.Random, level: int) -> Made:
    people = rng.sample(NAMES, 3 + level)
    truth = people[:]
    rng.shuffle(truth)
    pairs = [(a, b) for i, a in enumerate(truth) for b in truth[i + 1 :]]
    rng.shuffle(pairs)
    worlds, kept = list(itertools.permutations(people)), []
    for a, b in pairs:
        left = [w for w in worlds if w.index(a) < w.index(b)]
        if len(left) < len(worlds):
            worlds, kept = left, [*kept, (a, b)]
    place = rng.choice((1, len(people) - 2))
    if len({w[place] for w in worlds}) != 1 or len(kept) < 2 + level:
        return None
    words = ". ".join(f"{a} is heavier than {b}" if rng.random() < 0.5 else f"{b} is lighter than {a}" for a, b in kept)
    which = "second heaviest" if place == 1 else "second lightest"
    return f"{words}. Who is the {which} of the {len(people)}? Answer with a name.", truth[place]


def syllogism(rng: random.Random, level: int) -> Made:
    kinds = rng.sample(("painters", "swimmers", "bakers", "sailors", "teachers", "gardeners"), 2 + level)
    sorts = set(itertools.product((False, True), repeat=len(kinds)))  # of people: which of the kinds one is
    there: list[Callable[[tuple[bool, ...]], bool]] = [lambda s, i=i: s[i] for i in range(len(kinds))]
    words = []
    for a, b in itertools.pairwise(range(len(kinds))):
        form = rng.choice(("All", "No", "Some"))
        words.append(f"{form} {kinds[a]} are {kinds[b]}")
        if form == "Some":
            there.append(lambda s, a=a, b=b: s[a] and s[b])
        else:  # sorts that there are not
            sorts -= {s for s in sorts if s[a] and s[b] == (form == "No")}

    def possible(sorts: set[tuple[bool, ...]]) -> bool:
        """Whether a village of these sorts at most may be: if any, then one with all of them."""
        return all(any(holds(s) for s in sorts) for holds in there)

    both = {s for s in sorts if s[0] and s[-1]}
    if not possible(sorts):
        return None
    answer = "no" if not both else "cannot be told" if possible(sorts - both) else "yes"
    if answer == "cannot be told" and rng.random() < 0.95:  # else nearly all would be
        return None
    text = f"In a village there is at least one person of each kind. {'. '.join(words)}. Is anyone both among the "
    return f"{text}{kinds[0]} and among the {kinds[-1]}? Answer with yes, no or cannot be told.", answer


def secret_number(rng: random.Random, level: int) -> Made:
    low, high = 10 ** min(level, 2), 10 ** min(level + 1, 3) - 1
    truth = rng.randint(low, high)
    clues: list[tuple[str, Callable[[int], bool]]] = []
    for divisor in (3, 4, 7, 9, 11):
        rest = truth % divisor
        clues.append((f"divided by {divisor} it leaves {rest}", lambda i, d=divisor, r=rest: i % d == r))
    total = sum(map(int, str(truth)))
    clues.append((f"its digits add up to {total}", lambda i, t=total: sum(map(int, str(i))) == t))
    first, last = str(truth)[0], str(truth)[-1]
    relation = "larger than" if first > last else "smaller than" if first < last else "equal to"
    clues.append(
        (f"its first digit is {relation} its last", lambda i, f=(first > last) - (first < last): _sign(i) == f)
    )
    rng.shuffle(clues)
    left, kept = list(range(low, high + 1)), []
    for text, holds in clues:
        fewer = [i for i in left if holds(i)]
        if len(fewer) < len(left):
            left, kept = fewer, [*kept, text]
        if len(left) == 1:
            break
    if len(left) > 1 or len(kept) < 2:
        return None
    text = f"I think of a number from {low} to {high}. {'; '.join(kept)[0].upper()}{'; '.join(kept)[1:]}. Which is it?"
    return f"{text} Answer with a number.", str(truth)


def _sign(i: int) -> int:
    first, last = str(i)[0], str(i)[-1]
    return (first > last) - (first < last)


def round_table(rng: random.Random, level: int) -> Made:
    n = 4 if level == 1 else 6
    people = rng.sample(NAMES, n)
    truth = people[:]
    rng.shuffle(truth)
    clues: list[tuple[str, Callable[[Sequence[str]], bool]]] = []
    for a, b in itertools.combinations(people, 2):
        apart = (truth.index(a) - truth.index(b)) % n
        if apart in (1, n - 1):
            clues.append((f"{a} sits next to {b}", lambda p, a=a, b=b: (p.index(a) - p.index(b)) % n in (1, n - 1)))
        elif level < 3 or rng.random() < 0.7:
            clues.append(
                (f"{a} does not sit next to {b}", lambda p, a=a, b=b: (p.index(a) - p.index(b)) % n not in (1, n - 1))
            )
    rng.shuffle(clues)
    asked = rng.choice(people)

    def opposite(p: Sequence[str]) -> str:
        return p[(p.index(asked) + n // 2) % n]

    worlds, kept = [(people[0], *rest) for rest in itertools.permutations(people[1:])], []
    for text, holds in clues:
        if len({opposite(w) for w in worlds}) == 1:
            break
        left = [w for w in worlds if holds(w)]
        if len(left) < len(worlds):
            worlds, kept = left, [*kept, text]
    if len({opposite(w) for w in worlds}) > 1 or len(kept) > 4 + level:
        return None
    text = f"{listed(sorted(people))} sit evenly spaced around a table. {'. '.join(kept)}."
    return f"{text} Who sits opposite {asked}? Answer with a name.", opposite(truth)


# Planning: breadth-first search over states, or all orders.


def jugs(rng: random.Random, level: int) -> Made:
    sizes = sorted(rng.sample(range(3, 7 + 4 * level), 2 if level < 3 else 3))
    target = rng.randint(1, max(sizes) - 1)

    def pours(state: Hashable) -> Iterator[Hashable]:
        now = list(state)  # pyright: ignore[reportArgumentType]
        for i, size in enumerate(sizes):
            yield tuple(size if j == i else now[j] for j in range(len(sizes)))
            yield tuple(0 if j == i else now[j] for j in range(len(sizes)))
            for k in range(len(sizes)):
                if k != i:
                    moved = min(now[i], sizes[k] - now[k])
                    yield tuple(now[j] - moved * (j == i) + moved * (j == k) for j in range(len(sizes)))

    n = fewest((0,) * len(sizes), pours, lambda s: target in s)  # pyright: ignore[reportOperatorIssue]
    if not 2 * level <= n <= 2 * level + 2:
        return None
    text = f"You have empty jugs that hold {listed([str(s) for s in sizes])} litres, and a tap. A step "
    text += "fills a jug, empties "
    text += "it, or pours one into another until either the first is empty or the second is full. What is the smallest "
    return f"{text}number of steps after which some jug holds exactly {target} litres? Answer with a number.", str(n)


def grid(rng: random.Random, level: int) -> Made:
    n = 3 + level
    blocked = {(r, c) for r in range(n) for c in range(n) if rng.random() < 0.32} - {(0, 0), (n - 1, n - 1)}
    inside = {(r, c) for r in range(n) for c in range(n)} - blocked

    def moves(state: Hashable) -> Iterator[Hashable]:
        r, c = state  # pyright: ignore[reportGeneralTypeIssues]
        yield from (s for s in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)) if s in inside)

    steps = fewest((0, 0), moves, lambda s: s == (n - 1, n - 1))
    if steps < 2 * (n - 1) + (2 if level > 1 else 0):
        return None
    rows = "\n".join("".join("#" if (r, c) in blocked else "." for c in range(n)) for r in range(n))
    text = f"In this map `.` is free and `#` is a wall:\n{rows}\nYou move one field up, down, left or right at a time. "
    text += "What is the smallest number of moves from the top left to the bottom right field? Answer with a number."
    return text, str(steps)


def bridge(rng: random.Random, level: int) -> Made:
    times = sorted(rng.sample(range(1, 6 + 4 * level), 2 + level))
    start: tuple[frozenset[int], bool] = (frozenset(range(len(times))), True)
    best: dict[tuple[frozenset[int], bool], float] = {start: 0}
    queue: list[tuple[int, int, tuple[frozenset[int], bool]]] = [(0, 0, start)]
    count = itertools.count(1)
    while queue:
        cost, _, (here, near) = heapq.heappop(queue)
        if not here and not near:
            text = f"{len(times)} people need {listed([str(t) for t in times])} minutes to cross a "
            text += "bridge. At most two can "
            text += (
                "cross at once, at the pace of the slower one, and every crossing needs their only lamp. What is the "
            )
            return f"{text}shortest time in minutes in which all get across? Answer with a number.", str(cost)
        side = here if near else frozenset(range(len(times))) - here
        for group in itertools.chain(itertools.combinations(side, 1), itertools.combinations(side, 2)):
            after = (here - set(group) if near else here | set(group), not near)
            total = cost + max(times[i] for i in group)
            if total < best.get(after, math.inf):
                best[after] = total
                heapq.heappush(queue, (total, next(count), after))
    return None


def discs(rng: random.Random, level: int) -> Made:
    n = 1 + level
    start, goal = (tuple(rng.randrange(3) for _ in range(n)) for _ in range(2))

    def moves(state: Hashable) -> Iterator[Hashable]:
        at: tuple[int, ...] = state  # pyright: ignore[reportAssignmentType]
        for disc in range(n):  # disc 0 is the smallest
            if any(at[smaller] == at[disc] for smaller in range(disc)):
                continue
            for peg in range(3):
                if peg != at[disc] and all(at[smaller] != peg for smaller in range(disc)):
                    yield (*at[:disc], peg, *at[disc + 1 :])

    steps = fewest(start, moves, lambda s: s == goal)
    if steps < 2 * level:
        return None

    def said(state: Sequence[int]) -> str:
        pegs = [[str(d + 1) for d in reversed(range(n)) if state[d] == peg] for peg in range(3)]
        return "; ".join(f"{'ABC'[peg]}: {', '.join(on) if on else 'empty'}" for peg, on in enumerate(pegs))

    text = f"Discs 1 to {n}, of which 1 is the smallest, lie on pegs A, B and C, from the bottom up: "
    text += f"{said(start)}. A move "
    text += "takes the top disc of a peg to another peg, never onto a smaller disc. What is the "
    text += "smallest number of moves to "
    return f"{text}reach {said(goal)}? Answer with a number.", str(steps)


def workers(rng: random.Random, level: int) -> Made:
    n = 3 + level
    lengths = [rng.randint(1, 6) for _ in range(n)]
    after = {j: [i for i in range(j) if rng.random() < 0.35] for j in range(n)}
    best = math.inf
    for order in itertools.permutations(range(n)):
        if any(order.index(i) > order.index(j) for j in range(n) for i in after[j]):
            continue
        free, ends = [0, 0], {}
        for job in order:  # the best plan starts jobs as early as some order allows
            worker = min((0, 1), key=lambda w: (max(free[w], max((ends[i] for i in after[job]), default=0)), -free[w]))
            begin = max(free[worker], max((ends[i] for i in after[job]), default=0))
            free[worker] = ends[job] = begin + lengths[job]
        best = min(best, max(ends.values()))
    if not any(after.values()) or best == sum(lengths):
        return None
    jobs = listed([f"{'ABCDEFG'[i]} takes {length} hours" for i, length in enumerate(lengths)])
    rules = "; ".join(
        f"{'ABCDEFG'[j]} can begin only after {listed(['ABCDEFG'[i] for i in before])}"
        for j, before in after.items()
        if before
    )
    text = f"Two workers share {n} jobs: {jobs}. {rules}. A worker does one job at a time and does not "
    text += "interrupt it; no job "
    return f"{text}is shared. In how many hours can all be done at the earliest? Answer with a number.", str(best)


def roads(rng: random.Random, level: int) -> Made:
    towns = rng.sample(("Ash", "Birk", "Cove", "Dale", "Elm", "Ford", "Glen", "Holt"), 3 + level)
    pairs = list(itertools.combinations(towns, 2))
    chosen = rng.sample(pairs, min(len(pairs), 3 + 2 * level))
    lengths = {pair: rng.randint(2, 15) for pair in chosen}
    best = {towns[0]: 0}
    for _ in towns:
        for (a, b), length in lengths.items():
            for x, y in ((a, b), (b, a)):
                if x in best and best[x] + length < best.get(y, math.inf):
                    best[y] = best[x] + length
    goal = towns[-1]
    direct = lengths.get((towns[0], goal), math.inf)
    if goal not in best or best[goal] >= direct:
        return None
    said = "; ".join(f"{a} and {b}: {length} km" for (a, b), length in lengths.items())
    return f"Roads join these towns: {said}. How long is the shortest way from {towns[0]} to {goal} in kilometres? " + (
        "Answer with a number."
    ), str(best[goal])


def flips(rng: random.Random, level: int) -> Made:
    n = 3 + level
    row = list(range(1, n + 1))
    rng.shuffle(row)

    def turns(state: Hashable) -> Iterator[Hashable]:
        now: tuple[int, ...] = state  # pyright: ignore[reportAssignmentType]
        yield from ((*reversed(now[:k]), *now[k:]) for k in range(2, n + 1))

    steps = fewest(tuple(row), turns, lambda s: s == tuple(range(1, n + 1)))
    if steps < 1 + level:
        return None
    text = (
        f"Cards lie in a row: {', '.join(map(str, row))}. A move takes any number of cards from the left end and turns "
    )
    text += "their order round. What is the smallest number of moves that puts the cards in rising "
    text += "order from left to right?"
    return f"{text} Answer with a number.", str(steps)


def buttons(rng: random.Random, level: int) -> Made:
    up, down = rng.sample(range(2, 5 + 3 * level), 2)
    floors = rng.randint(12, 16) + 8 * level
    start, goal = rng.sample(range(1, floors + 1), 2)

    def presses(state: Hashable) -> Iterator[Hashable]:
        floor: int = state  # pyright: ignore[reportAssignmentType]
        yield from (f for f in (floor + up, floor - down) if 1 <= f <= floors)

    steps = fewest(start, presses, lambda s: s == goal)
    if not 1 + 2 * level <= steps <= 4 + 5 * level:
        return None
    text = f"The lift of a house with floors 1 to {floors} has two buttons: one goes up {up} floors, "
    text += f"one goes down {down}. A "
    text += "button does nothing if it would leave the house. How many presses does it take at least "
    text += f"from floor {start} to "
    return f"{text}floor {goal}? Answer with a number.", str(steps)


def calculator(rng: random.Random, level: int) -> Made:
    start, add = rng.randint(1, 9), rng.randint(2, 7)
    goal = rng.randint(20, 40) * 3 ** (level - 1)

    def keys(state: Hashable) -> Iterator[Hashable]:
        number: int = state  # pyright: ignore[reportAssignmentType]
        yield from (x for x in (number * 2, number + add, number - 1) if 0 <= x <= 4 * goal)

    steps = fewest(start, keys, lambda s: s == goal)
    if not 2 + level <= steps <= 5 + 2 * level:
        return None
    text = (
        f"A display shows {start}. One key doubles the number, one adds {add}, one subtracts 1. What is the smallest "
    )
    return f"{text}number of key presses after which it shows {goal}? Answer with a number.", str(steps)


TEMPLATES: dict[str, tuple[Template, ...]] = {
    "mathematics": (power_remainder, divisible, coins, seats, recurrence, dice, bells, polygon, digits),
    "deduction": (queue_order, knights, pets, boxes, heavier, syllogism, secret_number, round_table),
    "planning": (jugs, grid, bridge, discs, workers, roads, flips, buttons, calculator),
}


def problems() -> list[dict[str, str | int]]:
    """All problems, by category, difficulty and number."""
    made: list[dict[str, str | int]] = []
    for category, templates in TEMPLATES.items():
        for level in (1, 2, 3):
            rng = random.Random(f"{category} {level}")
            taken: set[str] = set()
            for number in range(PER_CELL):
                template = templates[number % len(templates)]
                text, answer = next(
                    found
                    for found in (template(rng, level) for _ in range(100_000))
                    if found is not None and found[0] not in taken
                )
                taken.add(text)
                line: dict[str, str | int] = {"id": f"{category}_{level}_{number:02d}", "category": category}
                made.append(line | {"problem": text, "answer": answer, "difficulty": level})
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file that is there")
    arguments = parser.parse_args(argv)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in problems())
    if arguments.check:
        same = OUT.exists() and OUT.read_text("utf-8") == text
        print(f"{OUT.name} is {'' if same else 'not '}what this script writes")
        return 0 if same else 1
    OUT.write_text(text, "utf-8")
    print(f"{text.count(chr(10))} problems in {OUT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
