"""What an implementation may be: the candidates that `npdrt.conform.identify` tries on answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from npdrt.conform.rules import Choices, Dialect, Rule
from npdrt.conform.rules.rule import PROFILES


class Candidate(NamedTuple):
    """A guess: all its choices, the dialect it starts from, and the choices that this lacks."""

    choices: Choices
    dialect: Dialect
    extra_choices: Choices


def candidates(rule: Rule) -> Iterator[Candidate]:
    """The dialects in any arithmetic, then each of them with one more clause changed."""
    profiles = arithmetics(rule)
    for dialect in rule.dialects:
        yield from in_any_arithmetic(dialect, {}, profiles)
    for dialect in rule.dialects:
        for change in faults(rule, dialect):
            yield from in_any_arithmetic(dialect, change, profiles)


def distinct(rule: Rule, every: Iterable[Candidate]) -> Iterator[Candidate]:
    """The candidates without those whose choices came before."""
    seen = set()
    for candidate in every:
        key = frozenset(rule.differences(candidate.choices).items())
        if key not in seen:
            seen.add(key)
            yield candidate


def arithmetics(rule: Rule) -> list[Choices]:
    """The published arithmetic and every other."""
    return [{}, *(c for c in single_changes(rule) if next(iter(c)) in PROFILES)]


def faults(rule: Rule, dialect: Dialect) -> list[Choices]:
    """Every change of one clause of a dialect, but those of arithmetic. A clause of a dialect that
    has several may be as published."""
    own = dialect.choices if len(dialect.choices) > 1 else {}
    back = [{clause: rule.full({})[clause]} for clause in own]
    others = [c for c in single_changes(rule) if not c.items() <= dialect.choices.items()]
    return [c for c in (*others, *back) if next(iter(c)) not in PROFILES]


def in_any_arithmetic(
    dialect: Dialect, change: Choices, profiles: Sequence[Choices]
) -> Iterator[Candidate]:
    """A dialect with clauses changed, in published arithmetic and in every other."""
    for profile in profiles:
        extra_choices = {**change, **profile}
        yield Candidate({**dialect.choices, **extra_choices}, dialect, extra_choices)


def single_changes(rule: Rule) -> Iterator[Choices]:
    """Every change of one clause of the published rule."""
    published = rule.full({})
    for clause, alternatives in rule.clauses.items():
        for alternative in alternatives:
            if alternative != published[clause]:
                yield {clause: alternative}
