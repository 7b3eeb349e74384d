"""Batches: calls that need nothing of each other, so that a GPU runs them in one launch.

    norm(w1) norm(g1) s1 w1' norm(w2) norm(g2) s2 w2'      as recorded, a parameter at a time
    [norm(w1) norm(g1) norm(w2) norm(g2)] [s1 s2] [w1' w2']

Every call gets a stage. A call that can run in the same loop as one that it needs (both work on
each element alone, on one shape) may have its stage; any other has a later one. Calls are as late
as the calls that need them allow, so that they join these: g + decay * w runs in the loop of the
update, and not in one of its own. What is of one stage and one kind is a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Chain = tuple[int, ...]  # calls


@dataclass(frozen=True, slots=True)
class Group:
    """Calls that run together: one call, or a chain of elementwise calls on one shape.

    chain_blocks: for every result that lives only inside the chain, the block that it uses.
    """

    calls: tuple[int, ...]
    chain: bool = False
    chain_blocks: tuple[tuple[int, int], ...] = ()


Batch = tuple[Group, ...]  # groups that need nothing of each other


def make_batches(
    calls: list[int],
    needs: dict[int, set[int]],
    joins: Callable[[int, int], bool],
    kind: Callable[[int], Any],
) -> list[list[Chain]]:
    """The chains of every batch, in the order of the batches.

    calls: in an order in which they can run. needs: those that have to run before a call. joins(d,
    c): whether call c can run in the loop of d, which it needs. kind(c): equal for calls of one
    stage that one launch can run.
    """
    stage = _stages(calls, needs, joins)
    together = [(d, c) for c in calls for d in needs[c] if stage[d] == stage[c] and joins(d, c)]
    batches: dict[Any, list[Chain]] = defaultdict(list)
    for chain in connected(calls, together):
        batches[stage[chain[0]], kind(chain[0])].append(chain)
    return [batches[key] for key in sorted(batches, key=lambda key: key[0])]


def _stages(
    calls: list[int], needs: dict[int, set[int]], joins: Callable[[int, int], bool]
) -> dict[int, int]:
    """The stage of every call: as late as its readers allow, and without a reader as soon as it
    can."""
    soonest: dict[int, int] = {}
    for c in calls:
        soonest[c] = max((soonest[d] + (not joins(d, c)) for d in needs[c]), default=0)
    stage: dict[int, int] = {}
    for c in reversed(calls):
        stage.setdefault(c, soonest[c])
        for d in needs[c]:
            latest = stage[c] - (not joins(d, c))
            stage[d] = min(stage.get(d, latest), latest)
    return stage


def connected(nodes: Iterable[int], edges: Iterable[tuple[int, int]]) -> list[Chain]:
    """The nodes in parts that no edge joins; parts and nodes in the order given.

    By union-find: `parent` leads from a node to another one of its part, in the end to the one that
    stands for all.
    """
    parent: dict[int, int] = {}

    def part(i: int) -> int:
        while parent.setdefault(i, i) != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in edges:
        parent[part(a)] = part(b)
    parts: dict[int, list[int]] = defaultdict(list)
    for node in nodes:
        parts[part(node)].append(node)
    return [tuple(found) for found in parts.values()]
