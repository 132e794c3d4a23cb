"""Which texts are the same or nearly the same, by the letters they share. Knows no meaning: a paraphrase differs.

Two texts are compared as sets of grams, every four letters in a row, by the Jaccard similarity: shared grams over all
grams. A slip of the pen changes four grams, where it would change a word and two pairs of words: of 2,477 questions of
banking77 with one word more, less, changed or moved, a greeting, or a typo, 0.6 of the grams finds 97 % (of those with
ten words 100 %), and 0.8 of the words and pairs of neighbouring words 52 %; of the natural pairs that it finds, 91 %
have the same intent. Other texts don't change the similarity of two but for `templates`, which the first few settle:
texts added at the end change nothing before them.

The search is exact but for crowds (see `_join`): 100,000 such questions take 14 s of one core and 150 MB. On the same
questions MinHash and LSH with 128 permutations took 25 s, 1.7 GB and missed 3 % (datasketch 2.0), or 5 s without
checking three million candidates and missed 0.1 % (rensa 0.5): not worth a dependency and a search by chance.
"""

import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from os.path import commonprefix

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.6
GRAM = 4  # letters
# Texts are compared if they share so many grams in their prefixes, or one in so many: fewer leave more to compare,
# more make the prefixes longer.
SHARED, PER_SHARED = 8, 7
CROWD = 32

# What so many of the first different texts begin or end with, and is so large a part of them, is a template.
FIRST, HAVING, PART = 64, 16, 0.4
WORDS_PER_NUMBER = 3

_APOSTROPHES = re.compile("['’‘`]")
# symbols such as + - < stay: `3 + 4` and `3 - 4` are different questions
_PUNCTUATION = re.compile(r"[.,;:!?…¡¿\"“”„«»()\[\]{}。，！？、]+")
_DIGITS = re.compile(r"\d+")
# scripts written without spaces: each character is a word
_DENSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_CHARACTER = re.compile(rf"([{_DENSE}])")
_WORD = re.compile(rf"[{_DENSE}]|[^\W{_DENSE}]+")
_PRIVATE, _PRIVATE_SIZE = 0xF0000, 0xFFFE  # code points that texts do not use

Integers = NDArray[np.int64]
Numbers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts by their places, `first < second`, and their similarity between 0 and 1."""

    first: int
    second: int
    similarity: float


@dataclass(frozen=True, slots=True)
class Alike:
    """Which of some texts are alike: each text's first place of its compared form, and the near pairs of these places.

    Two texts are near if they have the same first place, or their first places are a pair.
    """

    first: list[int]
    pairs: list[Pair]


def normalise(text: str) -> str:
    """The text without what does not change its meaning: case, sentence punctuation, spacing. Digits stay."""
    plain = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_PUNCTUATION.sub(" ", plain).split()) or " ".join(text.split())


def shingles(text: str) -> frozenset[str]:
    """The words and the pairs of neighbouring words of a text, digits as `0`; empty where it has no word."""
    words = _WORD.findall(_DIGITS.sub("0", normalise(text)))
    return frozenset(words).union(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))


def grams(form: str) -> frozenset[str]:
    """Every four letters in a row of a compared form (see `forms`), with a space before and behind it."""
    padded = f" {form} "
    return frozenset(padded[at : at + GRAM] for at in range(max(1, len(padded) - GRAM + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared members over all members, |a ∩ b| / |a ∪ b|; 0 where both are empty."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def forms(texts: Sequence[str]) -> list[str]:
    """What is compared of each text: normalised, without templates, numbers made alike where they are details.

    A number is a detail where its text has at least three words for each: two order numbers don't make two texts
    different, but two sums stay two sums.
    """
    plain = [normalise(text) for text in texts]
    beginnings, ends = templates(list(dict.fromkeys(plain))[:FIRST])
    return [_compared(text, beginnings, ends) for text in plain]


def templates(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The beginnings and the ends, in whole words, that belong to a template and not to the text put into it.

    Such as an instruction in front of every row, which would make all rows alike. Of the normalised texts given, the
    first of a set, at least sixteen have it and are made of it by 40 % or more.
    """
    words = [text.split() for text in texts]
    ends = _shared([each[::-1] for each in words])
    return [" ".join(each) for each in _shared(words)], [" ".join(each[::-1]) for each in ends]


def _shared(texts: list[list[str]]) -> list[list[str]]:
    """The beginnings that are templates, the most frequent first; each text counts for one of them."""
    found: list[list[str]] = []
    texts = sorted(texts)
    while True:
        # in sorted order, so many texts with the same beginning lie between two that have it
        candidates = [list(commonprefix([a, b])) for a, b in zip(texts, texts[HAVING - 1 :], strict=False)]
        counted = [(sum(_made_of(text, each) for text in texts), each) for each in candidates if each]
        count, best = max(counted, default=(0, []), key=lambda pair: (pair[0], len(pair[1])))
        if count < HAVING:
            return found
        found.append(best)
        texts = [text for text in texts if text[: len(best)] != best]


def _made_of(text: list[str], beginning: list[str]) -> bool:
    """Whether a text has this beginning, something after it, and not too much."""
    size = len(beginning)
    return text[:size] == beginning and size < len(text) and len(" ".join(beginning)) >= PART * len(" ".join(text))


def _compared(text: str, beginnings: list[str], ends: list[str]) -> str:
    begin = next((each for each in beginnings if text.startswith(f"{each} ")), "")
    text = text[len(begin) :].strip()
    end = next((each for each in ends if text.endswith(f" {each}")), "")
    text = text[: len(text) - len(end)].strip()
    if not text.isascii():
        text = " ".join(_CHARACTER.sub(r" \1 ", text).split())
    if not _DIGITS.search(text):
        return text
    words = text.split()
    numbers = sum(_DIGITS.search(word) is not None for word in words)
    if len(words) - numbers >= WORDS_PER_NUMBER * numbers:
        return _DIGITS.sub("0", text)
    # a whole number as one letter: 1234 and 1235 share nothing
    return _DIGITS.sub(lambda found: chr(_PRIVATE + zlib.crc32(found[0].encode()) % _PRIVATE_SIZE), text)


def near_pairs(texts: Sequence[str], threshold: float = THRESHOLD) -> list[Pair]:
    """The pairs of different texts whose similarity is at least `threshold` (above 0), in order.

    Texts that are equal when normalised count as one, named by its first place. Texts that differ only in what is not
    compared, such as an order number, have a pair with the first of them, and that one has the pairs with others.
    """
    different: dict[str, int] = {}
    for place, text in enumerate(texts):
        different.setdefault(normalise(text), place)
    alike = neighbours(texts, threshold)
    same = [Pair(alike.first[place], place, 1.0) for place in different.values() if alike.first[place] != place]
    return sorted(alike.pairs + same, key=lambda pair: (pair.first, pair.second))


def neighbours(texts: Sequence[str], threshold: float = THRESHOLD) -> Alike:
    """Which texts are equal, or have at least this similarity (above 0)."""
    places: dict[str, int] = {}
    first = [places.setdefault(form, place) for place, form in enumerate(forms(texts))]
    at = np.array(list(places.values()), dtype=np.int64)
    pairs = []
    for one, others, similarities in _join(list(places), threshold):
        there = at[others].tolist()
        pairs += [Pair(*each) for each in zip(there, repeat(int(at[one])), similarities.tolist())]
    return Alike(first, pairs)


def _join(distinct: Sequence[str], threshold: float) -> Iterator[tuple[int, Integers, NDArray[np.float64]]]:
    """Each form that has earlier ones near to it, these, and their similarities.

    Two sets with a similarity of t share at least t |a| members. With all members in one order, rarest first, the first
    |a| - ⌈t |a|⌉ + l of both share at least l of them (prefix filtering of length l, Wang, Li and Feng 2012), so only
    sets that share so many in an index of such prefixes are compared. Exact but for crowds: a form near to `CROWD`
    earlier ones is not put into the index.
    """
    if not distinct:
        return
    members, size = _as_integers(distinct)
    start = np.cumsum(size) - size
    least, shared_first = _shares(size, threshold)
    fewest = _shares(least, threshold)[1]  # of any set large enough
    stop = start + size - least + shared_first  # of the prefix
    counts = np.bincount(np.concatenate([members[a:b] for a, b in zip(start.tolist(), stop.tolist(), strict=True)]))
    begin = np.cumsum(counts) - counts
    end = begin.copy()
    posting = np.empty(counts.sum(), np.int32)  # from begin to end: the forms that have a member in their prefix
    mine = np.zeros(int(members.max()) + 1, dtype=bool)
    for one in range(len(size)):
        prefix = members[start[one] : stop[one]]
        lists = zip(begin[prefix].tolist(), end[prefix].tolist(), strict=True)
        times = np.bincount(np.concatenate([posting[a:b] for a, b in lists]))
        others = np.flatnonzero(times >= fewest[one])
        often = times[others] >= np.minimum(shared_first[one], shared_first[others])
        others = others[often & (size[others] >= least[one]) & (least[others] <= size[one])]
        found = 0
        if len(others):
            whole = members[start[one] : start[one] + size[one]]
            mine[whole] = True
            shared = _count(mine, members, start[others], size[others])
            mine[whole] = False
            similarities = shared / (size[others] + len(whole) - shared)
            near = similarities >= threshold
            found = int(np.count_nonzero(near))
            if found:
                yield one, others[near], similarities[near]
        if found < CROWD:
            posting[end[prefix]] = one
            end[prefix] += 1


def _shares(size: Integers, threshold: float) -> tuple[Integers, Integers]:
    """How many members sets share with others near to them: in all, and in their prefixes (l above)."""
    least = np.ceil(threshold * size - 1e-9).astype(np.int64)
    return least, np.minimum(least, np.maximum(SHARED, size // PER_SHARED))


def _as_integers(distinct: Sequence[str]) -> tuple[Numbers, Integers]:
    """The grams of each form as numbers, from the rarest up, all end to end; and how many each form has."""
    numbers: dict[str, int] = {}
    flat, sizes = array("i"), array("i")
    for form in distinct:
        found = grams(form)
        sizes.append(len(found))
        flat.extend([numbers.setdefault(gram, len(numbers)) for gram in found])
    rank = np.empty(len(numbers), np.int32)
    rank[np.argsort(np.bincount(flat), kind="stable")] = np.arange(len(numbers))
    members, size = rank[np.frombuffer(flat, np.int32)], np.array(sizes, dtype=np.int64)
    for end, count in zip(np.cumsum(size).tolist(), sizes, strict=True):
        members[end - count : end].sort()
    return members, size


def _count(mine: NDArray[np.bool_], members: Numbers, starts: Integers, sizes: Integers) -> Integers:
    """How many members of each of some sets are `mine`."""
    ends = np.cumsum(sizes)
    places = np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1])
    return np.add.reduceat(mine[members[places]], ends - sizes, dtype=np.int64)
