"""Which words differ between two texts. Knows words, not markup."""

import difflib
import re

LEAST_ALIKE = 0.25  # texts that share less are not compared: all of both would be marked
MOST_WORDS = 2000  # of a text; longer ones are not compared
Piece = tuple[str, bool]  # a text, and whether it is in the other text too

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def marked(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, those of only one of them marked False; their pieces joined are the texts given."""
    words, others = _WORDS.findall(before), _WORDS.findall(after)
    if max(len(words), len(others)) > MOST_WORDS:
        return [(before, True)], [(after, True)]
    matcher = difflib.SequenceMatcher(None, words, others, autojunk=False)
    blocks = matcher.get_matching_blocks()
    common = sum(not word.isspace() for block in blocks for word in words[block.a : block.a + block.size])
    if 2 * common < LEAST_ALIKE * sum(not word.isspace() for word in [*words, *others]):
        return [(before, True)], [(after, True)]
    first: list[Piece] = []
    second: list[Piece] = []
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        for pieces, part in ((first, words[start:end]), (second, others[other_start:other_end])):
            if part:
                pieces.append(("".join(part), kind == "equal"))
    return first, second
