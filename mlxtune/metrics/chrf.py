"""chrF: how many runs of up to six characters two texts share. Knows texts; the counting is sacrebleu's."""

from collections.abc import Sequence

from mlxtune.errors import DataError
from mlxtune.metrics.intervals import mean_share
from mlxtune.report.score import Score


def chrf(answers: Sequence[str], expected: Sequence[str], groups: Sequence[object] | None = None) -> Score:
    """The mean over rows of sacrebleu's sentence chrF (chrF2, six characters, no words), in [0, 1].

    answers, expected: (N,) texts. The interval is the bootstrap's over rows. sacrebleu's corpus score, which pools
    the counts of all rows, is another figure. Source: M. Popović, "chrF: character n-gram F-score for automatic MT
    evaluation", WMT 2015. Raises DataError for no rows.
    """
    from sacrebleu.metrics.chrf import CHRF  # takes a while

    if not answers:
        raise DataError("there are no rows to score")
    scorer = CHRF()
    values = [
        min(1.0, float(scorer.sentence_score(given, [wanted]).score) / 100)
        for given, wanted in zip(answers, expected, strict=True)
    ]
    return mean_share("chrf", values, groups=groups)
