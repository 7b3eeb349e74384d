"""Text as tokens: WikiText-2 and your own files, read as PyTorch's word_language_model does.

A folder has train.txt, valid.txt and test.txt, or the same with .gz. Lines are split at white
space and end with the word <eos>; words are numbered in the order in which they first appear in
train, valid and test. The tokens are then cut into parallel streams:

    tokens (n,) -> the first n // streams * streams, as (streams, rows), transposed: (rows, streams)
    batch k: x = rows [k L, k L + L), y = the rows after each of them; the last may be shorter

Source: github.com/pytorch/examples, word_language_model: data.py, and batchify and get_batch of
main.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.data import bounded, sample
from npdrt.data.dataset import Dataset
from npdrt.data.fetch import first_file, locate_local
from npdrt.data.sampler import Sampler
from npdrt.errors import Error, FileRefused
from npdrt.regular import require

Tokens = np.ndarray[Any, np.dtype[np.int64]]

REMEDY = (
    "Its publisher's link is gone, so npdrt cannot fetch it: put train.txt, valid.txt and test.txt "
    "there (the word_language_model example of pytorch/examples has them), or use text:FOLDER"
)
SPLITS = ("train", "valid", "test")
NAMED = "wikitext-2"
SAMPLE = "sample-text"  # made-up: `npdrt.data.sample`
END = "<eos>"
LENGTH = 35  # tokens of a sequence, unless the name says otherwise
EVALUATION_STREAMS = 10  # of valid and test, as in the example
_FORM = re.compile(r"text(?:-(\d+))?:(.+)")


@dataclass(frozen=True, eq=False)
class Text(Dataset):
    """Tokens in streams; see the module. classes and vocabulary: the number of words.

    x, y: (rows, streams) int64; y has the tokens after those of x. x_valid, x_test likewise. At
    first there is one stream; `as_streams_for` makes more. words: the word of every token. tokens:
    the whole splits. length: rows of a batch, the sequence length.
    """

    words: tuple[str, ...] = field(default=(), repr=False)
    tokens: Mapping[str, Tokens] = field(default_factory=dict, repr=False)
    length: int = LENGTH

    perplexity = True

    @property
    def evaluation_batch_size(self) -> int:
        """The largest number of rows in a batch of an evaluation: one sequence."""
        return self.length

    def as_streams_for(self, batch_size: int) -> Text:
        """The tokens in `batch_size` streams; valid and test in 10, or fewer if they are short."""
        counts = {split: most_streams(tokens) for split, tokens in self.tokens.items()}
        counts["train"] = batch_size
        pairs = {name: pair(self.tokens[name], count, name) for name, count in counts.items()}
        return replace(self, **_roles(pairs))

    def sampler(self, batch_size: int, seed: int) -> Sampler:
        """Sequences in order, the same in every epoch."""
        return Sampler(len(self.x), min(self.length, len(self.x)), seed, ordered=True)


def named(name: str) -> bool:
    """Whether a name is wikitext-2, text:FOLDER, text-LENGTH:FOLDER or sample-text."""
    return name in (NAMED, SAMPLE) or _FORM.fullmatch(name) is not None


def load(name: str, data_dir: str | Path | None = None) -> Text:
    """The text of a name.

    "wikitext-2" looks in data_dir, $NPDRT_DATA and the user's cache. "text:FOLDER" reads a folder,
    "text-70:FOLDER" in sequences of 70. "sample-text" has 3,600 made-up words.

    digests: SHA-256 of every file's text, and of the vocabulary. Raises Unavailable if WikiText-2
    is not there, Error if the folder is not there, FileRefused if a split is missing, empty or not
    UTF-8.
    """
    if name == SAMPLE:
        return make_dataset({split: sample.text(split) for split in SPLITS}, name)
    found = _FORM.fullmatch(name)
    length = int(found[1] or LENGTH) if found else LENGTH
    if length < 1:
        raise Error(f"{name}: a sequence has at least 1 token")
    folder = Path(found[2]) if found else locate_local(NAMED, data_dir, _files("train"), REMEDY)
    return read(folder, name, length)


def read(folder: Path, name: str, length: int = LENGTH) -> Text:
    """The text of a folder, in one stream."""
    require(folder, "directory")
    return make_dataset({split: _text(folder, split) for split in SPLITS}, name, length)


def make_dataset(texts: Mapping[str, str], name: str, length: int = LENGTH) -> Text:
    """The data set of three texts, each as one stream of tokens."""
    numbers: dict[str, int] = {}
    tokens = {split: tokenised(text, numbers) for split, text in texts.items()}
    digests = {f"{split}.txt": _sha256(text) for split, text in texts.items()}
    words = tuple(numbers)
    return Text(
        name,
        **_roles({split: pair(tokens[split], 1, split) for split in SPLITS}),
        classes=len(words),
        vocabulary=len(words),
        digests={**digests, "vocabulary": _sha256("\n".join(words))},
        words=words,
        tokens=tokens,
        length=length,
    )


def tokenised(text: str, numbers: dict[str, int]) -> Tokens:
    """The tokens of a text; new words are added to `numbers`.

    >>> tokenised("the cat saw\\nthe dog\\n", {})
    array([0, 1, 2, 3, 0, 4, 3])
    """
    return np.fromiter(
        (numbers.setdefault(word, len(numbers)) for word in _words(text)), dtype=np.int64
    )


def _words(text: str) -> Iterable[str]:
    for line in text.removesuffix("\n").split("\n"):
        yield from line.split()
        yield END


def in_streams(tokens: Tokens, streams: int) -> Tokens:
    """Tokens cut into parallel streams; tokens left over at the end are dropped."""
    rows = len(tokens) // streams
    cut = tokens[: rows * streams].reshape(streams, rows)  # (streams, rows)
    return np.ascontiguousarray(cut.T)  # (rows, streams)


def most_streams(tokens: Tokens) -> int:
    """The number of streams for evaluation: 10, or fewer if there are less than 20 tokens."""
    return max(1, min(EVALUATION_STREAMS, len(tokens) // 2))


def pair(tokens: Tokens, streams: int, split: str) -> tuple[Tokens, Tokens]:
    """Inputs and the tokens after them, (rows - 1, streams) each."""
    rows = in_streams(tokens, streams)
    if len(rows) < 2:
        raise Error(
            f"{split}: {len(tokens)} tokens are too few for {streams} streams, which need "
            f"{2 * streams}; use a smaller batch size"
        )
    return rows[:-1], rows[1:]


def _roles(pairs: Mapping[str, tuple[Tokens, Tokens]]) -> dict[str, Any]:
    """The fields of a data set by name."""
    suffixes = {"train": "", "valid": "_valid", "test": "_test"}
    named = ((suffixes[split], pair) for split, pair in pairs.items())
    return {f"{a}{suffix}": v for suffix, both in named for a, v in zip("xy", both, strict=True)}


# Reading


def _files(split: str) -> tuple[str, str]:
    return f"{split}.txt", f"{split}.txt.gz"


def _text(folder: Path, split: str) -> str:
    path = first_file(folder, *_files(split))
    if path is None:
        raise FileRefused(f"{folder}: expected {' or '.join(_files(split))}; found neither")
    found = bounded.text(path).replace("\r\n", "\n").replace("\r", "\n")
    if not found.strip():
        raise FileRefused(f"{path}: expected text; the file is empty")
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
