"""Which texts are the same or nearly the same, by the words they share. Knows words, not meaning: a paraphrase differs.

Texts are compared as sets of shingles: each word, and each pair of neighbouring words, in lower case and without
punctuation; a run of digits counts as `0`, so that two order numbers don't make two texts different. Words alone
would be blind to order, longer shingles too strict for a short row: in a text of 15 words one changed word leaves a
similarity of 0.81.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

THRESHOLD = 0.8
# A shingle in more texts than this belongs to a template, such as an instruction in front of every row.
COMMON_SHARE = 0.1
COMMON_AT_LEAST = 8

_APOSTROPHES = re.compile("['’‘`]")
# symbols such as + - < stay: `3 + 4` and `3 - 4` are different questions
_PUNCTUATION = re.compile(r"[.,;:!?…¡¿\"“”„«»()\[\]{}。，！？、]+")
_DIGITS = re.compile(r"\d+")
# scripts written without spaces: each character is a word
_DENSE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_DENSE}]|[^\W{_DENSE}]+")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts by their places, `first < second`, and their similarity between 0 and 1."""

    first: int
    second: int
    similarity: float


def normalise(text: str) -> str:
    """The text without what does not change its meaning: case, sentence punctuation, spacing. Digits stay."""
    plain = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_PUNCTUATION.sub(" ", plain).split()) or " ".join(text.split())


def shingles(text: str) -> frozenset[str]:
    """The words and the pairs of neighbouring words of a text, digits as `0`; empty where it has no word."""
    words = _WORD.findall(_DIGITS.sub("0", normalise(text)))
    return frozenset(words).union(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared members over all members, |a ∩ b| / |a ∪ b|; 0 where both are empty."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def near_pairs(texts: Sequence[str], threshold: float = THRESHOLD) -> list[Pair]:
    """Every pair of different texts whose Jaccard similarity is at least `threshold` (above 0), in order.

    Texts that are equal when normalised count as one, named by its first place. A shingle that more than a tenth of
    the different texts have (and more than eight of them) says nothing about a pair: without such shingles the pair
    must still reach half the threshold. So a long instruction in front of each row does not make all rows alike; in
    return, two texts that are told apart from the rest by little are not found.

    Exact otherwise: with one order of all shingles, rarest first, the first shingle that two sets with a similarity
    of t share is among the first |a| - ⌈t·|a|⌉ + 1 of each (prefix filtering, Chaudhuri et al. 2006), so only texts
    that meet in an index of those are compared.
    """
    places: dict[str, int] = {}
    for place, text in enumerate(texts):
        places.setdefault(normalise(text), place)
    whole = {place: shingles(text) for text, place in places.items()}
    having = Counter(shingle for each in whole.values() for shingle in each)
    limit = max(COMMON_AT_LEAST, COMMON_SHARE * len(whole))
    telling = {place: frozenset(s for s in each if having[s] <= limit) for place, each in whole.items()}

    index: dict[str, list[int]] = defaultdict(list)
    found = []
    for place, mine in whole.items():
        length = len(mine) - math.ceil(threshold * len(mine) - 1e-9) + 1
        rarest = [s for s in sorted(mine, key=lambda s: (having[s], s))[:length] if s in telling[place]]
        for other in {each for shingle in rarest for each in index[shingle]}:
            similarity = jaccard(mine, whole[other])
            if similarity >= threshold and jaccard(telling[place], telling[other]) >= threshold / 2:
                found.append(Pair(other, place, similarity))
        for shingle in rarest:
            index[shingle].append(place)
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def groups(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """The group of each text: equal and near texts are together, and so are their neighbours' neighbours."""
    first: dict[str, int] = {}
    equal = [(first.setdefault(normalise(text), place), place) for place, text in enumerate(texts)]
    return connected(len(texts), equal + [(pair.first, pair.second) for pair in near_pairs(texts, threshold)])


def connected(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """The group of each of `count` things when linked things belong together; a group is named by its first member."""
    parent = list(range(count))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(place) for place in range(count)]
