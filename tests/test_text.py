"""Text: WikiText-2 as PyTorch's example reads it, the user's files, and batches in order."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npdrt import Error, data
from npdrt.data import Sampler, bounded, text
from npdrt.errors import FileRefused, Unavailable

SMALL = {
    "train": " = A title = \n\n the cat saw the dog\n the dog ran\n",
    "valid": "the bird ran\n",
    "test": "a bird saw the cat\n\n",
}
WIKITEXT = Path(os.environ.get("NPDRT_DATA", "")) / "wikitext-2"


def write(folder: Path, **changes: Any) -> Path:
    """The small texts in a folder, with some of them changed; None leaves one out."""
    for split, content in (SMALL | changes).items():
        if content is not None:
            raw = content if isinstance(content, bytes) else content.encode()
            (folder / f"{split}.txt").write_bytes(raw)
    return folder


def batches(dataset: Any, streams: int) -> list[tuple[Any, Any]]:
    """All batches of an epoch."""
    found = dataset.as_streams_for(streams)
    sampler = found.sampler(streams, 0)
    rows = [sampler.batch(step) for step in range(sampler.batches_per_epoch)]
    return [(found.x[r], found.y[r]) for r in rows]


def example_batches(tokens: Any, streams: int, length: int) -> list[tuple[Any, Any]]:
    """Those of word_language_model: batchify and get_batch, with flat targets."""
    n = len(tokens) // streams
    source = tokens[: n * streams].reshape(streams, -1).T
    starts = range(0, len(source) - 1, length)
    lengths = [min(length, len(source) - 1 - i) for i in starts]
    return [
        (source[i : i + n], source[i + 1 : i + 1 + n].reshape(-1))
        for i, n in zip(starts, lengths, strict=True)
    ]


# --- reading ---------------------------------------------------------------------------------


def test_words_are_numbered_as_they_appear_in_train_valid_test(tmp_path: Path) -> None:
    found = data.load(f"text:{write(tmp_path)}")
    assert isinstance(found, text.Text)
    spelled = ("=", "A", "title", "<eos>", "the", "cat", "saw", "dog", "ran", "bird", "a")
    assert found.words == spelled
    assert found.classes == found.vocabulary == found.outputs == 11
    train = [0, 1, 2, 0, 3, 3, 4, 5, 6, 4, 7, 3, 4, 7, 8, 3]
    assert found.tokens["train"].tolist() == train
    assert found.tokens["valid"].tolist() == [4, 9, 8, 3]
    assert found.tokens["test"].tolist() == [10, 9, 6, 4, 5, 3, 3]
    assert found.x.dtype == found.y.dtype == np.int64


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 is not on this machine")
def test_wikitext_2_is_that_of_the_example() -> None:
    """33,278 words, as the example and the authors' parameter count have it."""
    found = data.load("wikitext-2")
    assert isinstance(found, text.Text)
    assert len(found.words) == found.classes == 33_278
    counts = {split: len(tokens) for split, tokens in found.tokens.items()}
    assert counts == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    assert found.words[:5] == ("<eos>", "=", "Valkyria", "Chronicles", "III")
    arranged = found.as_streams_for(20)
    assert (arranged.x.shape, arranged.x_test.shape) == ((104_430, 20), (24_555, 10))  # type: ignore[union-attr]
    assert arranged.sampler(20, 0).batches_per_epoch == 2_984


def test_plain_and_packed_files_are_the_same_data(tmp_path: Path) -> None:
    plain = data.load(f"text:{write(tmp_path)}")
    packed = tmp_path / "packed"
    packed.mkdir()
    for split, content in SMALL.items():
        (packed / f"{split}.txt.gz").write_bytes(gzip.compress(content.encode()))
    other = data.load(f"text:{packed}")
    assert plain.digests == other.digests
    assert sorted(plain.digests) == ["test.txt", "train.txt", "valid.txt", "vocabulary"]
    assert np.array_equal(plain.x, other.x)


def test_line_ends_do_not_change_the_tokens(tmp_path: Path) -> None:
    unix = data.load(f"text:{write(tmp_path)}")
    windows = {split: content.replace("\n", "\r\n") for split, content in SMALL.items()}
    assert data.load(f"text:{write(tmp_path, **windows)}").digests == unix.digests
    unended = SMALL["train"].removesuffix("\n")
    found = data.load(f"text:{write(tmp_path, train=unended)}")
    assert np.array_equal(found.x, unix.x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid": None}, r"expected valid\.txt or valid\.txt\.gz; found neither"),
        ({"test": ""}, r"test\.txt: expected text; the file is empty"),
        ({"test": " \n\n"}, "the file is empty"),
        ({"train": "the cat\nthe d\u00f6g".encode("latin-1")}, "not UTF-8 at byte 13, line 2"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(FileRefused, match=message):
        data.load(f"text:{write(tmp_path, **changes)}")


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"the cat\n" * 500)[:-9]], ids=["text", "cut"]
)
def test_bad_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, train=None)
    (tmp_path / "train.txt.gz").write_bytes(content)
    with pytest.raises(FileRefused, match="not a whole gzip file"):
        data.load(f"text:{tmp_path}")


def test_a_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "FREE", 1000)
    write(tmp_path, train=None)
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"a" * 1_000_000))
    with pytest.raises(FileRefused, match="unpacks to more than"):
        data.load(f"text:{tmp_path}")


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Error, match=r" does not exist"):
        data.load(f"text:{tmp_path}/none")
    with pytest.raises(Error, match="at least 1 token"):
        data.load(f"text-0:{tmp_path}")
    monkeypatch.setenv("NPDRT_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"npdrt cannot fetch it: put train\.txt"):
        data.load("wikitext-2")
    with pytest.raises(Error, match="did you mean 'wikitext-2'"):
        data.load("wikitext2")


def test_the_sample_is_learnable_text() -> None:
    found = data.load("sample-text")
    assert isinstance(found, text.Text)
    assert [found.words[i] for i in found.tokens["train"][:9]][1:4] == ["lives", "in", "Rome"]
    assert len(found.words) == 30


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("streams", "length"), [(1, 35), (4, 7), (3, 1), (20, 35), (7, 35)])
def test_batches_are_those_of_the_example(tmp_path: Path, streams: int, length: int) -> None:
    words = " ".join(str(n % 97) for n in range(1234))
    found = data.load(f"text-{length}:{write(tmp_path, train=words)}")
    assert isinstance(found, text.Text)
    expected = example_batches(found.tokens["train"], streams, length)
    ours = batches(found, streams)
    assert len(ours) == len(expected)
    for (x, y), (a, b) in zip(ours, expected, strict=True):
        assert np.array_equal(x, a)
        assert np.array_equal(y.reshape(-1), b)


def test_valid_and_test_have_ten_streams() -> None:
    found = data.load("sample-text").as_streams_for(4)
    assert found.x.shape == (899, 4)
    for x, y in ((found.x_valid, found.y_valid), (found.x_test, found.y_test)):
        assert x is not None
        assert x.shape == y.shape == (53, 10)
        assert np.array_equal(x[1:], y[:-1])


def test_short_texts_are_evaluated_in_fewer_streams(tmp_path: Path) -> None:
    found = data.load(f"text:{write(tmp_path)}").as_streams_for(2)
    assert found.x_valid is not None
    assert found.x_test is not None
    assert (found.x_valid.shape, found.x_test.shape) == ((1, 2), (1, 3))


def test_every_epoch_has_the_same_order() -> None:
    sampler = data.load("sample-text").as_streams_for(20).sampler(20, seed=5)
    n = sampler.batches_per_epoch
    assert [sampler.batch(step).tolist() for step in range(n)] == [
        sampler.batch(step + n).tolist() for step in range(n)
    ]
    ordered = Sampler(10, 4, ordered=True)
    assert [ordered.batch(k).tolist() for k in range(4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3],
    ]  # fmt: skip


def test_a_text_too_short_for_its_streams_is_refused() -> None:
    with pytest.raises(Error, match="train: 3600 tokens are too few for 2000 streams"):
        data.load("sample-text").as_streams_for(2000)


def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path: Path) -> None:
    texts = {"train": "the cat\r\nthe dog\r\n", "valid": "the cat\n", "test": "a dog\n"}
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    for folder, mark in ((plain, b""), (marked, b"\xef\xbb\xbf")):
        folder.mkdir()
        for split, content in texts.items():
            (folder / f"{split}.txt").write_bytes(mark + content.encode())
    expected, found = text.read(plain, "a"), text.read(marked, "a")
    assert found.words == expected.words == ("the", "cat", "<eos>", "dog", "a")
    assert found.digests == expected.digests


def test_a_pipe_is_no_text(tmp_path: Path) -> None:
    for split in ("valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a b\n")
    os.mkfifo(tmp_path / "train.txt")
    with pytest.raises(FileRefused, match=r"expected train\.txt or train\.txt\.gz; found neither"):
        text.read(tmp_path, "a")
