"""SQuAD v1.1: reading, WordPiece features with a stride, answers from logits, exact match and F1.

The steps are those of the original BERT script run_squad.py, except for one: the tokeniser gives
the place of every token in the text, so an answer is cut out of the text itself. The script aligns
words again.

Source: Rajpurkar et al. 2016; Devlin et al. 2019, section 4.2; google-research/bert, run_squad.py;
the official evaluate-v1.1.py.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from npdrt import schema
from npdrt.data import bounded, sample
from npdrt.data.dataset import Dataset
from npdrt.data.fetch import first_file, locate_local
from npdrt.errors import Error, FileRefused, Unavailable
from npdrt.regular import require

NAMED = "squad"
REMEDY = "Put train-v1.1.json, dev-v1.1.json and the vocab.txt of a BERT there, or use squad:FOLDER"
SAMPLE = "sample-squad"  # made up: `npdrt.data.sample`
SAMPLE_SIZES = {"length": 48, "stride": 16, "query": 12}
LENGTH, STRIDE, QUERY = 384, 128, 64  # tokens: of a feature, between its spans, of a question
BEST, LONGEST = 20, 30  # starts and ends that are tried, tokens of the longest answer
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
Scores = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Question:
    """A question on a text. answers: at least one pair (text, place of its first character)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Feature:
    """A question and a span of its text as tokens: [CLS] question [SEP] span [SEP].

    question: its number. tokens, types: BERT's input, without padding. offsets: place in `tokens`
    -> the characters (first, past the last) of the text, for every token of the span. best: the
    places that have their most context in this span. start, end: the answer's first and last
    place; 0, the place of [CLS], if the answer is not in the span.
    """

    question: int
    tokens: tuple[int, ...]
    types: tuple[int, ...]
    offsets: Mapping[int, tuple[int, int]]
    best: frozenset[int]
    start: int = 0
    end: int = 0


# Reading


class _Answer(Struct):
    text: str
    answer_start: int


class _Item(Struct):
    id: str
    question: str
    answers: list[_Answer]


class _Paragraph(Struct):
    context: str
    qas: list[_Item]


class _Article(Struct):
    paragraphs: list[_Paragraph]


class _Document(Struct):
    data: list[_Article]


def read(path: Path) -> list[Question]:
    """The questions of a file in SQuAD's JSON, or .json.gz.

    Raises FileRefused, with the place, for bad JSON or UTF-8, a missing key, a value of another
    type, an answer outside its text, no answers, no questions, or an id that occurs twice.
    """
    content = schema.parse(bounded.unpacked(path), _Document, path)
    questions = list(_questions(content, f"{path}: "))
    twice = [id for id, n in Counter(q.id for q in questions).items() if n > 1]
    if twice:
        raise FileRefused(f"{path}: the id {twice[0]!r} occurs twice")
    if not questions:
        raise FileRefused(f"{path}: no questions")
    return questions


def _questions(content: Any, path: str) -> Iterator[Question]:
    for a, article in enumerate(content["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            context = paragraph["context"]
            for n, item in enumerate(paragraph["qas"]):
                place = f"{path}data[{a}].paragraphs[{p}].qas[{n}]"
                answers = tuple(_answers(item["answers"], context, place))
                found = Question(item["id"], item["question"], context, answers)
                _require_unicode(found, place)
                yield found


def _answers(answers: Any, context: str, place: str) -> Iterator[tuple[str, int]]:
    if not answers:
        raise FileRefused(f"{place}: a question without an answer; that is SQuAD 2.0, not 1.1")
    for number, answer in enumerate(answers):
        text, start = answer["text"], answer["answer_start"]
        if not text or not 0 <= start < len(context):
            raise FileRefused(
                f"{place}.answers[{number}]: expected an answer that begins in the {len(context)} "
                f"characters of its context; found {text!r} at {start}"
            )
        yield text, start


def _require_unicode(question: Question, place: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold and the tokeniser cannot."""
    texts = (text for text, _ in question.answers)
    try:
        "".join((question.id, question.question, question.context, *texts)).encode()
    except UnicodeEncodeError as error:
        raise FileRefused(f"{place}: expected Unicode text: {error}") from error


# Tokens and features


def tokeniser(vocabulary: Path | Mapping[str, int], *, lower: bool = True) -> Any:
    """The WordPiece tokeniser (library `tokenizers`) of a vocabulary.

    vocabulary: a file with one token on each line, or the number of every token. lower: first
    convert to lower case and remove accents. Raises Unavailable without the library, FileRefused if
    the file cannot be read or lacks [PAD], [UNK], [CLS] or [SEP].
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    except ImportError as error:
        raise Unavailable(
            'tokenizers is not installed; install it with pip install "npdrt[text]"'
        ) from error
    numbers = _vocabulary(vocabulary) if isinstance(vocabulary, Path) else dict(vocabulary)
    pieces = models.WordPiece(vocab=numbers, unk_token="[UNK]", max_input_chars_per_word=100)
    made = Tokenizer(pieces)
    made.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def _vocabulary(path: Path) -> dict[str, int]:
    words = bounded.text(path).removesuffix("\n").split("\n")
    numbers = {word.rstrip("\r"): number for number, word in enumerate(words)}
    missing = [token for token in SPECIAL if token not in numbers]
    if missing or len(numbers) != len(words):
        what = f"lacks {', '.join(missing)}" if missing else "has a token twice"
        raise FileRefused(f"{path}: not a WordPiece vocabulary, a token a line: it {what}")
    if numbers["[PAD]"] != 0:
        raise FileRefused(f"{path}: expected [PAD] as the first token; it is {numbers['[PAD]']}")
    return numbers


def features(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    length: int = LENGTH,
    stride: int = STRIDE,
    query: int = QUERY,
) -> list[Feature]:
    """The features of questions: spans of their texts that begin `stride` tokens apart.

    A question is cut to its first `query` tokens; a span takes the rest of `length`. The first
    answer is marked if its text is at its place.
    """
    if length < query + 4 or stride < 1 or query < 1:
        raise Error(
            f"features: expected a length of at least query + 4, and a stride and a query of at "
            f"least 1; got length {length}, stride {stride}, query {query}"
        )
    contexts: dict[str, Any] = {}
    return [
        feature
        for number, question in enumerate(questions)
        for feature in _features_of(question, number, tokenizer, (length, stride, query), contexts)
    ]


def _features_of(
    question: Question,
    number: int,
    tokenizer: Any,
    sizes: tuple[int, int, int],
    contexts: dict[str, Any],
) -> Iterator[Feature]:
    """The features of one question. contexts: tokens of the texts so far."""
    length, stride, query = sizes
    asked = tokenizer.encode(question.question, add_special_tokens=False).ids[:query]
    if question.context not in contexts:
        contexts[question.context] = tokenizer.encode(question.context, add_special_tokens=False)
    encoded = contexts[question.context]
    offsets = [(a, _whole(question.context, b)) for a, b in encoded.offsets]
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    head, answer = (cls, *asked, sep), _answer_tokens(question, offsets)
    spans = list(_spans(len(encoded.ids), length - len(head) - 1, stride))
    for first, past in spans:
        shift = len(head) - first  # from a token of the text to its place
        inside = answer is not None and first <= answer[0] and answer[1] < past
        places = range(first, past)
        yield Feature(
            question=number,
            tokens=(*head, *encoded.ids[first:past], sep),
            types=(*[0] * len(head), *[1] * (past - first + 1)),
            offsets={i + shift: offsets[i] for i in places},
            best=frozenset(i + shift for i in places if _best_span(spans, i) == (first, past)),
            start=answer[0] + shift if inside and answer else 0,
            end=answer[1] + shift if inside and answer else 0,
        )


def _whole(context: str, past: int) -> int:
    """The end of a token together with the combining marks that the tokeniser removed after it."""
    while past < len(context) and unicodedata.category(context[past]) == "Mn":
        past += 1
    return past


def _spans(tokens: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Spans (first, past the last) of at most `room` tokens, `stride` apart."""
    first = 0
    while first + room < tokens:
        yield first, first + room
        first += min(room, stride)
    yield first, tokens


def _best_span(spans: Sequence[tuple[int, int]], token: int) -> tuple[int, int]:
    """The span with the most context around a token, measured on the smaller side.

    Longer spans win by a little; the first one wins a tie.
    """

    def context(span: tuple[int, int]) -> float:
        first, past = span
        if not first <= token < past:
            return -1.0
        return min(token - first, past - 1 - token) + 0.01 * (past - first)

    return max(spans, key=context)


def _answer_tokens(
    question: Question, offsets: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The first and last token that the first answer touches.

    None if the text at its place is another; the script also skips such an answer.
    """
    text, start = question.answers[0]
    end = start + len(text)
    if question.context[start:end] != text:
        return None
    touched = [i for i, (first, past) in enumerate(offsets) if first < end and past > start]
    return (touched[0], touched[-1]) if touched else None


def arrays(found: Sequence[Feature], length: int = LENGTH) -> tuple[Any, Any]:
    """The inputs and targets of BERT.

    x: (features, 3, length) int32: tokens, types and mask. y: (features, 2) int64: the first and
    last place of the answer.
    """
    x = np.zeros((len(found), 3, length), np.int32)
    for row, feature in zip(x, found, strict=True):
        used = len(feature.tokens)
        row[:, :used] = feature.tokens, feature.types, [1] * used
    y = np.array([(f.start, f.end) for f in found], np.int64).reshape(-1, 2)
    return x, y


# Answers and their scores


def answers(
    questions: Sequence[Question],
    found: Sequence[Feature],
    logits: Scores,
    *,
    best: int = BEST,
    longest: int = LONGEST,
) -> dict[str, str]:
    """The answer to every question, by id, from logits (features, 2, length).

    It is the pair of a start and an end with the largest sum of logits, over all features of the
    question. A start is one of the `best` starts, and has its most context in that feature; an end
    is one of the `best` ends; the pair spans at most `longest` tokens. "" if there is no such pair.
    """
    winners: dict[int, tuple[float, str]] = {}
    for feature, (starts, ends) in zip(found, logits, strict=True):
        context = questions[feature.question].context
        for score, (first, past) in _candidates(feature, starts, ends, best, longest):
            if feature.question not in winners or score > winners[feature.question][0]:
                winners[feature.question] = score, context[first:past]
    return {q.id: winners.get(number, (0.0, ""))[1] for number, q in enumerate(questions)}


def _candidates(
    feature: Feature, starts: Scores, ends: Scores, best: int, longest: int
) -> Iterator[tuple[float, tuple[int, int]]]:
    """The sum of logits and the characters of the text, for every span that can be an answer."""
    for i in _largest(starts, best):
        for j in _largest(ends, best):
            known = i in feature.best and j in feature.offsets
            if known and i <= j < i + longest:
                yield float(starts[i] + ends[j]), (feature.offsets[i][0], feature.offsets[j][1])


def _largest(scores: Scores, count: int) -> list[int]:
    order: list[int] = np.argsort(-scores, kind="stable")[:count].tolist()
    return order


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and spare white space, as the official evaluation.

    >>> normalise_answer("The  Denver Broncos!")
    'denver broncos'
    """
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(given: str, answer: str) -> float:
    """1 if both are the same after `normalise_answer`, else 0."""
    return float(normalise_answer(given) == normalise_answer(answer))


def f1(given: str, answer: str) -> float:
    """The harmonic mean of precision and recall over the words of `normalise_answer`."""
    a, b = normalise_answer(given).split(), normalise_answer(answer).split()
    same = sum((Counter(a) & Counter(b)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(a), same / len(b)
    return 2.0 * precision * recall / (precision + recall)


def score(questions: Iterable[Question], given: Mapping[str, str]) -> dict[str, float]:
    """The means of exact match and F1 in percent; the best of a question's answers counts.

    A question that is missing in `given` counts 0.
    """
    every = list(questions)

    def mean(measure: Callable[[str, str], float]) -> float:
        each = (
            max(measure(given[q.id], answer) for answer, _ in q.answers) if q.id in given else 0.0
            for q in every
        )
        return 100.0 * sum(each) / len(every)

    return {"exact_match": mean(exact_match), "f1": mean(f1)}


# The data set


@dataclass(frozen=True, eq=False)
class Squad(Dataset):
    """Features of SQuAD v1.1: x (features, 3, length) int32 and y (features, 2), see `arrays`.

    The test set is the development set. questions, found: its questions and features, for
    `answers`.
    """

    questions: Sequence[Question] = field(default=(), repr=False)
    found: Sequence[Feature] = field(default=(), repr=False)

    @property
    def evaluation_batch_size(self) -> int:
        """The largest number of features in a batch of an evaluation."""
        return 32


def named(name: str) -> bool:
    """Whether a data set's name is squad, squad:FOLDER or sample-squad."""
    return name in (NAMED, SAMPLE) or name.startswith(f"{NAMED}:")


def load(
    name: str, data_dir: str | Path | None = None, *, lower: bool = True, **sizes: int
) -> Squad:
    """SQuAD v1.1 in a folder with train-v1.1.json, dev-v1.1.json and vocab.txt (or .gz).

    vocab.txt is the vocabulary of the BERT that you fine-tune. name: "squad:FOLDER"; "squad" looks
    in data_dir, $NPDRT_DATA and the user's cache; "sample-squad" has made-up questions. lower:
    convert to lower case, also with a cased vocabulary, as in the Fromage experiments. sizes:
    length, stride and query of `features`. Raises Unavailable or Error if the folder or a library
    is missing, FileRefused if a file is missing or malformed.
    """
    if name == SAMPLE:
        return _sample(SAMPLE_SIZES | sizes)
    if name == NAMED:
        folder = locate_local(NAMED, data_dir, _files("train-v1.1.json"), REMEDY)
    else:
        folder = Path(name.removeprefix(f"{NAMED}:"))
    require(folder, "directory")
    paths = {part: _path(folder, f"{part}-v1.1.json") for part in ("train", "dev")}
    vocabulary = _path(folder, "vocab.txt")
    files = {**{path.name: path for path in paths.values()}, "vocabulary": vocabulary}
    digests = {what: bounded.digest(path) for what, path in files.items()}
    parts = {part: read(path) for part, path in paths.items()}
    return make_dataset(name, parts, tokeniser(vocabulary, lower=lower), digests, **sizes)


def make_dataset(
    name: str,
    parts: Mapping[str, Sequence[Question]],
    tokenizer: Any,
    digests: dict[str, str],
    **sizes: int,
) -> Squad:
    """The data set of the questions in parts["train"] and parts["dev"]."""
    found = {part: features(questions, tokenizer, **sizes) for part, questions in parts.items()}
    length = sizes.get("length", LENGTH)
    (x, y), (x_test, y_test) = (arrays(found[part], length) for part in ("train", "dev"))
    return Squad(
        name,
        x=x,
        y=y,
        x_test=x_test,
        y_test=y_test,
        classes=length,
        digests=digests,
        notes=tuple(_notes(parts["train"])),
        vocabulary=tokenizer.get_vocab_size(),
        questions=parts["dev"],
        found=found["dev"],
    )


def _notes(questions: Sequence[Question]) -> Iterator[str]:
    lost = sum(q.context[s : s + len(t)] != t for q in questions for t, s in q.answers[:1])
    if lost:
        yield f"{lost} of {len(questions):,} training answers are not at their places; skipped"


def _sample(sizes: Mapping[str, int]) -> Squad:
    """The questions of `npdrt.data.sample`; each of its words is a token."""
    numbers = {token: i for i, token in enumerate((*SPECIAL, *sample.words()))}
    parts = {
        part: [
            Question(f"{part}-{i}", question, context, ((answer, start),))
            for i, (question, context, answer, start) in enumerate(sample.paragraphs(part))
        ]
        for part in sample.PARAGRAPHS
    }
    said = "\n".join((*numbers, *(f"{q}" for found in parts.values() for q in found)))
    digests = {"vocabulary": hashlib.sha256(said.encode()).hexdigest()}
    return make_dataset(SAMPLE, parts, tokeniser(numbers, lower=False), digests, **sizes)


def _path(folder: Path, name: str) -> Path:
    path = first_file(folder, *_files(name))
    if path is None:
        raise FileRefused(f"{folder}: expected {' or '.join(_files(name))}; found neither")
    return path


def _files(name: str) -> tuple[str, str]:
    return name, f"{name}.gz"
