"""SQuAD: strict reading, features with a stride, answers from logits, and the official scores."""

from __future__ import annotations

import copy
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npdrt import Error, data
from npdrt.data import squad
from npdrt.data.squad import Question, answers, features, score
from npdrt.errors import FileRefused, Unavailable

CONTEXT = (
    "Super Bowl 50 was played in Santa Clara, California. The Denver Broncos won (24\u201310)."
)
DEV = Path(os.environ.get("NPDRT_DATA", "")) / "squad" / "dev-v1.1.json.gz"
needs_dev = pytest.mark.skipif(not DEV.is_file(), reason="SQuAD is not on this machine")


def document() -> dict[str, Any]:
    """A file of two questions."""
    where = {"text": "Santa Clara, California", "answer_start": 28}
    who = {"text": "Denver Broncos", "answer_start": CONTEXT.index("Denver")}
    qas = [
        {"id": "1", "question": "Where was it played?", "answers": [where]},
        {"id": "2", "question": "Who won?", "answers": [who, {**who, "text": "Denver"}]},
    ]
    return {
        "version": "1.1",
        "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}],
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(*path: Any, value: Any) -> Any:
    """The document with the value at a place changed; `...` takes the key away."""
    content: Any = copy.deepcopy(document())
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return content


QUESTION = ("data", 0, "paragraphs", 0, "qas", 1)


# --- reading ---------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    plain = squad.read(write(tmp_path / "a.json", document()))
    assert [q.id for q in plain] == ["1", "2"]
    assert plain[1].answers == (("Denver Broncos", 57), ("Denver", 57))
    assert plain[0].context == CONTEXT
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(document()).encode()))
    assert squad.read(tmp_path / "a.json.gz") == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON in UTF-8"),
        ("[" * 100_000, "not JSON in UTF-8"),
        ([], r"bad\.json: Expected `object`, got `array`"),
        ({}, r"bad\.json: the key data is missing"),
        ({"data": [3]}, r"Expected `object`, got `int` - at `\$\.data\[0\]`"),
        ({"data": []}, "no questions"),
        (
            changed(*QUESTION[:4], "context", value=1),
            r"`str`, .*paragraphs\[0\]\.context`",
        ),
        (
            changed(*QUESTION, "question", value=...),
            r"question is missing - at .*qas\[1\]`",
        ),
        (
            changed(*QUESTION, "question", value="\ud83d"),
            r"qas\[1\]: expected Unicode text: .*surr",
        ),
        (changed(*QUESTION, "id", value=7), r"Expected `str`, got `int` - at .*qas\[1\]\.id"),
        (changed(*QUESTION, "id", value="1"), "the id '1' occurs twice"),
        (
            changed(*QUESTION, "answers", value=[]),
            r"qas\[1\]: a question without an answer; .* 2\.0",
        ),
        (
            changed(*QUESTION, "answers", 1, "answer_start", value=9999),
            r"qas\[1\]\.answers\[1\]: expected an answer that begins in the 84 characters .* 9999",
        ),
        (
            changed(*QUESTION, "answers", 0, "answer_start", value=-1),
            "found 'Denver Broncos' at -1",
        ),
        (
            changed(*QUESTION, "answers", 0, "answer_start", value=True),
            "Expected `int`, got `bool`",
        ),
        (changed(*QUESTION, "answers", 0, "text", value=""), "found '' at 57"),
    ],
)
def test_malformed_files_are_refused_with_the_place(
    tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(FileRefused, match=message):
        squad.read(write(tmp_path / "bad.json", content))


@needs_dev
def test_the_development_set() -> None:
    """10,570 questions, and every answer at its place."""
    questions = squad.read(DEV)
    assert len(questions) == 10_570
    assert all(q.context[s : s + len(t)] == t for q in questions for t, s in q.answers)
    assert score(questions, {q.id: q.answers[0][0] for q in questions})["exact_match"] == 100.0


# --- tokens ----------------------------------------------------------------------------------


def vocabulary(folder: Path, texts: list[str], size: int = 120) -> Path:
    """A WordPiece vocabulary trained on some texts."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        texts, vocab_size=size, min_frequency=1, show_progress=False,
        special_tokens=[*squad.SPECIAL, "[MASK]"],
    )  # fmt: skip
    tokens = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token, _ in tokens), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return squad.tokeniser(vocabulary(tmp_path, [CONTEXT, "Where was it played? Who won?"]))


def test_the_tokeniser_is_berts(tmp_path: Path) -> None:
    """The same tokens as the library's BertWordPieceTokenizer, and as transformers' own."""
    tokenizers = pytest.importorskip("tokenizers")
    path = vocabulary(tmp_path, [CONTEXT])
    twin = tokenizers.BertWordPieceTokenizer(str(path), lowercase=True)
    for spoken in (CONTEXT, "D\u00e9nver  BRONCOS\u00a0won\u2026", "\u4e2d\u56fd unseen", ""):
        ours = squad.tokeniser(path).encode(spoken, add_special_tokens=False)
        theirs = twin.encode(spoken, add_special_tokens=False)
        assert (ours.ids, ours.offsets) == (theirs.ids, theirs.offsets)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the\ncat\n", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\n", "has a token twice"),
        (b"a\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"expected \[PAD\] as the first token; it is 1"),
        (b"\xff\n", "not UTF-8 at byte 0"),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(FileRefused, match=message):
        squad.tokeniser(tmp_path / "vocab.txt")


def test_without_the_library_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Unavailable, match=r'pip install "npdrt\[text\]"'):
        squad.tokeniser(tmp_path / "vocab.txt")


# --- features --------------------------------------------------------------------------------


def test_a_short_text_is_one_feature(tmp_path: Path, tokenizer: Any) -> None:
    questions = squad.read(write(tmp_path / "a.json", document()))
    found = features(questions, tokenizer)
    assert [f.question for f in found] == [0, 1]
    for feature, question in zip(found, questions, strict=True):
        cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        assert feature.tokens[0] == cls
        assert [i for i, t in enumerate(feature.tokens) if t == sep][-1] == len(feature.tokens) - 1
        text, start = question.answers[0]
        first, past = feature.offsets[feature.start][0], feature.offsets[feature.end][1]
        assert question.context[first:past] == text == question.context[start : start + len(text)]
        assert set(feature.types[: feature.start]) >= {0}
        assert {feature.types[i] for i in feature.offsets} == {1}
        assert feature.best == frozenset(feature.offsets)


def brute_spans(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """The loop of run_squad.py."""
    spans, start = [], 0
    while start < tokens:
        length = min(tokens - start, room)
        spans.append((start, start + length))
        if start + length == tokens:
            break
        start += min(length, stride)
    return spans


def test_spans_are_those_of_the_script() -> None:
    for tokens in range(1, 60):
        for room, stride in ((7, 3), (10, 10), (5, 9), (60, 4)):
            assert list(squad._spans(tokens, room, stride)) == brute_spans(tokens, room, stride)


def test_the_best_span_is_the_scripts() -> None:
    """`_check_is_max_context`, with its left and right context and its 0.01 of the length."""
    for spans in (brute_spans(40, 12, 5), brute_spans(33, 10, 4), brute_spans(9, 20, 4)):
        for token in range(spans[-1][1]):
            best, chosen = None, None
            for start, past in spans:
                if not start <= token <= past - 1:
                    continue
                context = min(token - start, past - 1 - token) + 0.01 * (past - start)
                if best is None or context > best:
                    best, chosen = context, (start, past)
            assert squad._best_span(spans, token) == chosen


@needs_dev
def test_long_texts_give_overlapping_features(tmp_path: Path) -> None:
    """On real paragraphs: every token is best in one feature, and the answer, where a feature
    holds it whole, is marked so that its text holds the answer; elsewhere [CLS] is."""
    questions = squad.read(DEV)[:60]
    tokenizer = squad.tokeniser(vocabulary(tmp_path, [q.context for q in questions], 400))
    found = features(questions, tokenizer, length=64, stride=20, query=16)
    assert len(found) > 3 * len(questions)
    marked = set()
    for number, question in enumerate(questions):
        mine = [f for f in found if f.question == number]
        assert sum(len(f.best) for f in mine) == len(
            tokenizer.encode(question.context, add_special_tokens=False).ids
        )
        text, start = question.answers[0]
        for feature in mine:
            assert len(feature.tokens) <= 64
            if feature.start:
                marked.add(number)
                first, past = feature.offsets[feature.start][0], feature.offsets[feature.end][1]
                assert first <= start < start + len(text) <= past
    assert len(marked) == len(questions)
    x, y = squad.arrays(found, 64)
    assert (x.shape, y.shape, x.dtype) == ((len(found), 3, 64), (len(found), 2), np.int32)
    assert x[:, 2].sum() == sum(len(f.tokens) for f in found)


def test_long_questions_are_cut(tokenizer: Any) -> None:
    question = Question("1", "who " * 50, CONTEXT, (("won", CONTEXT.index("won")),))
    (feature,) = features([question], tokenizer, query=10)
    assert feature.types.count(0) == 12


def test_an_answer_that_is_not_at_its_place_is_passed_over(tokenizer: Any) -> None:
    question = Question("1", "Who won?", CONTEXT, (("Denver", 3),))
    (feature,) = features([question], tokenizer)
    assert (feature.start, feature.end) == (0, 0)
    assert list(squad._notes([question])) == [
        "1 of 1 training answers are not at their places; skipped"
    ]


def test_impossible_sizes_are_refused(tokenizer: Any) -> None:
    with pytest.raises(Error, match="a length of at least query"):
        features([], tokenizer, length=60)


# --- answers ---------------------------------------------------------------------------------


def test_answers_are_the_best_pairs_that_are_allowed(tokenizer: Any) -> None:
    question = Question("1", "Who won?", CONTEXT, (("Denver Broncos", 57),))
    (feature,) = features([question], tokenizer)
    logits = np.full((1, 2, 384), -5.0)
    logits[0, 0, feature.start], logits[0, 1, feature.end] = 3.0, 3.0
    assert answers([question], [feature], logits) == {"1": "Denver Broncos"}
    logits[0, :, 0] = 9.0  # [CLS] is no answer, nor is a token of the question
    logits[0, :, 1] = 9.0
    logits[0, 1, feature.start - 1] = 9.0  # an end before the start
    assert answers([question], [feature], logits) == {"1": "Denver Broncos"}
    short = answers([question], [feature], logits, longest=1)["1"]
    assert short != "Denver Broncos"
    nothing = np.full((1, 2, 384), -5.0)
    nothing[0, :, 40:80] = 1.0  # only padding is among the best
    assert answers([question], [feature], nothing, best=5) == {"1": ""}


def test_a_start_counts_only_where_its_context_is_best(tokenizer: Any) -> None:
    question = Question("1", "Who won?", CONTEXT, (("Denver Broncos", 57),))
    found = features([question], tokenizer, length=14, stride=4, query=8)
    assert len(found) > 2
    logits = np.full((len(found), 2, 14), -5.0)
    worse = next(i for i, f in enumerate(found) if set(f.offsets) - f.best)
    place = min(set(found[worse].offsets) - found[worse].best)
    logits[worse, :, place] = 10.0
    first, past = found[worse].offsets[place]
    assert answers([question], found, logits)["1"] != CONTEXT[first:past]


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "answer", "exact", "overlap"),
    [
        ("Denver Broncos", "Denver Broncos", 1, 1),
        ("the Denver  Broncos!", "Denver Broncos", 1, 1),
        ("An apple.", "apple", 1, 1),
        ("theatre", "atre", 0, 0),
        ("Broncos", "Denver Broncos", 0, 2 / 3),
        ("the the the", "a", 1, 0),
        ("a b b c", "b b d", 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("24\u201310", "24\u201310", 1, 1),
        ("2410", "24-10", 1, 1),
        ("", "Denver", 0, 0),
    ],
)
def test_scores_of_known_cases(given: str, answer: str, exact: float, overlap: float) -> None:
    """By the rules of evaluate-v1.1.py: lower case, no ASCII punctuation, no articles. An answer
    of nothing but articles has no words, so an F1 of 0 though the match is exact."""
    assert squad.exact_match(given, answer) == exact
    assert squad.f1(given, answer) == pytest.approx(overlap)


def test_the_score_is_the_best_over_answers_and_a_mean_over_questions() -> None:
    questions = [
        Question("1", "?", "c", (("Santa Clara", 0), ("California", 0))),
        Question("2", "?", "c", (("Denver Broncos", 0),)),
        Question("3", "?", "c", (("x", 0),)),
    ]
    found = score(questions, {"1": "california", "2": "Broncos"})
    assert found == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx(500 / 9)}


# --- the data set ----------------------------------------------------------------------------


def folder(tmp_path: Path) -> Path:
    vocabulary(tmp_path, [CONTEXT, "Where was it played? Who won?"])
    write(tmp_path / "train-v1.1.json", document())
    (tmp_path / "dev-v1.1.json.gz").write_bytes(gzip.compress(json.dumps(document()).encode()))
    return tmp_path


def test_a_folder_is_a_data_set(tmp_path: Path) -> None:
    found = data.load(f"squad:{folder(tmp_path)}")
    assert isinstance(found, squad.Squad)
    assert found.x.shape == (2, 3, 384)
    assert found.classes == 384
    assert found.vocabulary == len((tmp_path / "vocab.txt").read_text().splitlines())
    assert sorted(found.digests) == ["dev-v1.1.json.gz", "train-v1.1.json", "vocabulary"]
    assert [q.id for q in found.questions] == ["1", "2"]


def test_a_packed_vocabulary_is_read(tmp_path: Path) -> None:
    plain = data.load(f"squad:{folder(tmp_path)}")
    words = tmp_path / "vocab.txt"
    (tmp_path / "vocab.txt.gz").write_bytes(gzip.compress(words.read_bytes()))
    words.unlink()
    found = data.load(f"squad:{tmp_path}")
    assert found.vocabulary == plain.vocabulary
    np.testing.assert_array_equal(found.x, plain.x)


@pytest.mark.parametrize("name", ["vocab.txt", "train-v1.1.json", "dev-v1.1.json.gz"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (folder(tmp_path) / name).unlink()
    with pytest.raises(FileRefused, match=f"expected {name.removesuffix('.gz')} or"):
        data.load(f"squad:{tmp_path}")


def test_a_missing_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Error, match=r" does not exist"):
        data.load(f"squad:{tmp_path}/none")
    monkeypatch.setenv("NPDRT_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"Put train-v1\.1\.json"):
        data.load("squad")


# --- what is no part of a word, and what is ---------------------------------------------------


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("the cafe\u0301 is open", "cafe\u0301"),
        ("open in Krako\u0301w", "Krako\u0301w"),
        ("a cafe\u0301\u0323", "cafe\u0301\u0323"),
        ("cafe\u0301, open", "cafe\u0301"),
        ("the caf\u00e9 is open", "caf\u00e9"),
    ],
)
def test_an_answer_keeps_its_combining_marks(context: str, answer: str) -> None:
    """The tokeniser takes accents away; the text that is cut out has them."""
    words = [*squad.SPECIAL, "where", "?", "the", "a", "cafe", "is", "open", "in", "krakow", ","]
    made = squad.tokeniser({word: n for n, word in enumerate(words)})
    asked = Question("1", "where?", context, ((answer, context.index(answer)),))
    (feature,) = squad.features([asked], made, length=24, stride=8, query=6)
    logits = np.zeros((1, 2, 24))
    logits[0, 0, feature.start] = logits[0, 1, feature.end] = 9.0
    assert squad.answers([asked], [feature], logits) == {"1": answer}


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.json", document())
    expected = squad.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert squad.read(path) == expected
    words = tmp_path / "vocab.txt"
    words.write_bytes(b"\xef\xbb\xbf[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\nthe\r\n")
    assert squad.tokeniser(words).token_to_id("[PAD]") == 0
    words.write_bytes("[PAD]\n".encode("utf-16"))
    with pytest.raises(FileRefused, match="its byte order mark says UTF-16: save it as UTF-8"):
        squad.tokeniser(words)
