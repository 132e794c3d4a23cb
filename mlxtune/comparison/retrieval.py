"""Which passages suit a question, by the words that they share (BM25). Knows texts and files, not models or prompts.

BM25 scores a passage by its rare words that the question has too (Robertson and Zaragoza 2009, "The Probabilistic
Relevance Framework: BM25 and Beyond"); the arithmetic is that of the library bm25s, with its defaults k1 = 1.5 and
b = 0.75. The same passages and question always give the same order: of equal scores the earlier passage is first.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxtune.data.files import Row
from mlxtune.data.formats import Example, answer_text, prompt_text
from mlxtune.data.similar import normalise
from mlxtune.errors import DataError

SUFFIXES = (".txt", ".md")
PASSAGE = 800  # characters: paragraphs are joined up to this, and cut above it
LARGEST_FOLDER = 256 << 20  # bytes of all documents
# a word, or one character of a script that is written without spaces
_DENSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TERM = re.compile(rf"[{_DENSE}]|[^\W{_DENSE}]+")
_PARAGRAPHS = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that can be shown with a question, and where it stands; `question` is that of a training row, else ``."""

    where: str
    text: str
    question: str = ""


def terms(text: str) -> list[str]:
    """The words of a text as they are compared: normalised, in order."""
    return _TERM.findall(normalise(text))


class Index:
    """Passages, ready to be searched. Of a row's passage its question alone is compared where `questions` says so."""

    def __init__(self, passages: Sequence[Passage], *, questions: bool = False):
        import bm25s

        self.passages = list(passages)
        self.texts = [normalise(each.text) for each in self.passages]
        words = [terms(each.question if questions else each.text) for each in self.passages]
        self.scorer = bm25s.BM25() if any(words) else None
        if self.scorer is not None:
            self.scorer.index(words, show_progress=False)

    def search(self, question: str, count: int, without: Collection[str] = ()) -> list[int]:
        """The places of up to `count` passages that share a word with the question, the best first.

        Passages whose normalised text is in `without` are never found: a row must not be shown its own answer.
        """
        asked = terms(question)
        if self.scorer is None or not asked:
            return []
        scores = np.asarray(self.scorer.get_scores(asked), dtype=np.float64)
        order = np.argsort(-scores, kind="stable")
        found: list[int] = []
        for place in order.tolist():
            if len(found) == count or scores[place] <= 0:
                break
            if self.texts[place] not in without:
                found.append(place)
        return found


def of_rows(rows: Sequence[tuple[Row, Example]]) -> list[Passage]:
    """Each row that has an answer as a passage: what it asks, and below it the answer."""
    found = []
    for row, example in rows:
        answer = answer_text(example)
        if answer is not None:
            found.append(Passage(row.where, row_text(example), prompt_text(example)))
    return found


def row_text(example: Example) -> str:
    """A row as a passage: question and answer, a line each or more."""
    return f"{prompt_text(example).strip()}\n{(answer_text(example) or '').strip()}"


def of_folder(name: str) -> list[Passage]:
    """The texts of a folder (.txt and .md, also in folders below it) as passages, in the order of their names.

    Links are not followed. Raises DataError for no such folder, one without texts, and files that cannot be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError("is not a folder", where=name, hint="give a folder of .txt or .md files as compare.documents")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink()
    )
    if sum(path.stat().st_size for path in files) > LARGEST_FOLDER:
        hint = "give a smaller folder as compare.documents"
        raise DataError(f"holds more than {LARGEST_FOLDER >> 20} MB of texts", where=name, hint=hint)
    passages = [
        Passage(f"{path}#{number}", text) for path in files for number, text in enumerate(split(_read(path)), start=1)
    ]
    if not passages:
        raise DataError("has no text in .txt or .md files", where=name, hint="give a folder of texts")
    return passages


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("is not UTF-8", where=path, hint="save the text as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path, hint="check its permissions") from None


def split(text: str, longest: int = PASSAGE) -> list[str]:
    """A text as passages of whole paragraphs of up to `longest` characters in all; a longer paragraph is cut at spaces.

    A heading stays with what comes after it.
    """
    pieces = [piece for each in _PARAGRAPHS.split(text.replace("\r\n", "\n")) for piece in _cut(each.strip(), longest)]
    found: list[str] = []
    for piece in pieces:
        if found and len(found[-1]) + 2 + len(piece) <= longest and not piece.startswith("#"):
            found[-1] += f"\n\n{piece}"
        else:
            found.append(piece)
    return found


def _cut(paragraph: str, longest: int) -> list[str]:
    found = []
    while len(paragraph) > longest:
        space = paragraph.rfind(" ", 1, longest + 1)
        end = space if space > 0 else longest
        found.append(paragraph[:end].rstrip())
        paragraph = paragraph[end:].lstrip()
    return [*found, paragraph] if paragraph else found
