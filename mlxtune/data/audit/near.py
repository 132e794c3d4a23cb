"""Which rows ask nearly the same, and whether a word in which they differ is why they have other labels.

Knows letters and how often words come with labels, not what they mean.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from mlxtune.data.audit.entries import Entry
from mlxtune.data.similar import Pair, near_pairs

TELLING = 3  # times as frequent as elsewhere a word must be with a label to tell it
RARE = 2  # prompts that have a slip of the pen, where a word would be in more
SAME = 0.8  # similarity from which more words than one may differ in a contradiction


def near_prompts(entries: Sequence[Entry]) -> list[Pair]:
    """Pairs of different prompts that are nearly the same, in order, but those that other labels rightly tell apart.

    A prompt is named by the place of its first row.
    """
    firsts: dict[str, Entry] = {}
    for entry in entries:
        firsts.setdefault(entry.key, entry)
    places = [entry.place for entry in firsts.values()]
    found = [Pair(places[pair.first], places[pair.second], pair.similarity) for pair in near_pairs(list(firsts))]
    if all(entries[each.first].meaning == entries[each.second].meaning for each in found):
        return found
    words = _WordCounts(entries)
    return [each for each in found if not words.explain(entries[each.first], entries[each.second], each.similarity)]


class _WordCounts:
    """In how many different prompts of each label each word stands."""

    def __init__(self, entries: Sequence[Entry]):
        self.prompts: Counter[str | None] = Counter()
        self.having: dict[str | None, Counter[str]] = defaultdict(Counter)
        self.anywhere: Counter[str] = Counter()
        for key, meaning in {(entry.key, entry.meaning) for entry in entries}:
            words = set(key.split())
            self.prompts[meaning] += 1
            self.having[meaning].update(words)
            self.anywhere.update(words)

    def explain(self, a: Entry, b: Entry, similarity: float) -> bool:
        """Whether two rows with other labels differ enough for it: in more than a word, or in a word that tells.

        `how do I change my pin` and `how do I change my address` have one word's difference, and rightly two labels.
        """
        if a.meaning == b.meaning or a.meaning is None or b.meaning is None:
            return False
        mine, theirs = Counter(a.key.split()), Counter(b.key.split())
        only_a, only_b = mine - theirs, theirs - mine
        if max(only_a.total(), only_b.total()) > 1 and similarity < SAME:
            return True
        if only_a.total() == only_b.total() == 1 and self.is_slip(*only_a, *only_b):
            return False
        return any(self.tells(word, a.meaning, b.meaning) for word in only_a) or any(
            self.tells(word, b.meaning, a.meaning) for word in only_b
        )

    def is_slip(self, a: str, b: str) -> bool:
        return is_slip(a, b) and min(self.anywhere[a], self.anywhere[b]) <= RARE

    def tells(self, word: str, mine: str, other: str) -> bool:
        """Whether the label `mine` comes with the word much more often than `other`, and than all other labels do.

        This prompt is not counted, and one more for `other`, so that a word that is rare everywhere tells nothing.
        """
        own = self.having[mine][word] - 1
        rate = own / max(1, self.prompts[mine] - 1)
        beside = (self.having[other][word] + 1) / self.prompts[other]
        elsewhere = (self.anywhere[word] - own - 1) / (self.prompts.total() - self.prompts[mine])
        return own >= RARE and rate > TELLING * max(beside, elsewhere)


def is_slip(a: str, b: str) -> bool:
    """Whether one of two words, of four letters or more, has a letter lost, added, wrong, or swapped with the next."""
    if max(len(a), len(b)) < 4 or min(len(a), len(b)) < 3 or any(map(str.isdigit, a + b)):
        return False
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    rest, others = a[start:], b[start:]
    if len(rest) == len(others):
        return rest[1:] == others[1:] or (rest[:2] == others[1::-1] and rest[2:] == others[2:])
    return rest[1:] == others or rest == others[1:]
