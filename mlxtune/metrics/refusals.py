"""The share of answers that begin like a refusal. A guess from a few English phrases, not an understanding."""

import re
from collections.abc import Sequence

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score

# what an answer begins with, once "sorry, but" and the like are passed over
PHRASES = (
    "i can't",
    "i cannot",
    "i can not",
    "i could not",
    "i couldn't",
    "i won't",
    "i will not",
    "i'm unable to",
    "i am unable to",
    "i'm not able to",
    "i am not able to",
    "i'm not allowed to",
    "i am not allowed to",
    "i must decline",
    "i have to decline",
    "i don't have access",
    "i do not have access",
    "i'm just an ai",
    "i am just an ai",
    "it is not possible for me to",
    "it's not possible for me to",
    "i don't know",
    "i do not know",
)
_OPENING = re.compile(
    r"(?:(?:i'?m|i am|we'?re|we are)? ?(?:very |so |really |truly )?(?:sorry|afraid)|unfortunately|my apologies"
    r"|i apologi[sz]e|apologies|as an ai(?: language)? ?(?:model|assistant)?|as a(?: large)? language model|no)"
    r"[ ,.;:!]*(?:but |that |however |and )?"
)
_MARKS = " \t\r\n\"'`*_>#-"


def is_refusal(answer: str) -> bool:
    """Whether an answer begins with one of `PHRASES`, in any case, after up to three openings such as "sorry, but"."""
    start = " ".join(answer[:400].replace("’", "'").lower().strip(_MARKS).split())
    for _ in range(4):
        if start.startswith(PHRASES):
            return True
        opening = _OPENING.match(start)
        if opening is None:
            return False
        start = start[opening.end() :]
    return False


def refusals(answers: Sequence[str], groups: Sequence[object] | None = None) -> Score:
    """The share of answers (N,) that `is_refusal`, in [0, 1], with an interval as of `mean_share`.

    Raises DataError for no rows.
    """
    if not answers:
        raise DataError("there are no rows to score")
    return mean_share("refusals", list(map(is_refusal, answers)), groups=groups, better="lower")
