"""Made-up text and questions for tests and first runs: small and learnable, without a download.

Every sentence has the form "Ada lives in Oslo and likes tea ."
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from npdrt.random import Random

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gail", "Hugo")
PLACES = ("Athens", "Bonn", "Cork", "Delhi", "Lima", "Oslo", "Paris", "Rome")
THINGS = ("apples", "bread", "chess", "figs", "music", "rain", "soup", "tea")
QUESTIONS = ("where does {} live ?", "what does {} like ?")
SENTENCES = {"train": 400, "valid": 60, "test": 60}
PARAGRAPHS = {"train": 48, "dev": 12}
FACTS = 3  # sentences of a paragraph


def text(split: str) -> str:
    """Sentences, one on each line."""
    return "".join(f"{_sentence(*fact)}\n" for fact in _facts(split, SENTENCES[split]))


def paragraphs(part: str) -> Iterator[tuple[str, str, str, int]]:
    """Tuples (question, paragraph, answer, place of its first character).

    A paragraph has three facts. The questions ask for the place and the thing by turns.
    """
    facts = list(_facts(f"squad/{part}", FACTS * PARAGRAPHS[part]))
    for number in range(PARAGRAPHS[part]):
        chosen = facts[FACTS * number : FACTS * (number + 1)]
        sentences = [_sentence(*fact) for fact in chosen]
        asked = number % FACTS
        answer = chosen[asked][1 + number % 2]
        start = sum(len(s) + 1 for s in sentences[:asked]) + sentences[asked].index(answer)
        yield QUESTIONS[number % 2].format(chosen[asked][0]), " ".join(sentences), answer, start


@cache
def words() -> tuple[str, ...]:
    """Every word of `paragraphs`."""
    spoken = " ".join((*QUESTIONS, "lives in and likes .", *NAMES, *PLACES, *THINGS))
    return tuple(sorted({word for word in spoken.split() if word != "{}"}))


def _facts(purpose: str, count: int) -> Iterator[tuple[str, str, str]]:
    """Name, place and thing; neighbouring names differ."""
    drawn = Random(0, f"sample/{purpose}").words(2 * count) % len(PLACES)
    for number, (place, thing) in enumerate(drawn.reshape(count, 2).tolist()):
        yield NAMES[number % len(NAMES)], PLACES[place], THINGS[thing]


def _sentence(name: str, place: str, thing: str) -> str:
    return f"{name} lives in {place} and likes {thing} ."
