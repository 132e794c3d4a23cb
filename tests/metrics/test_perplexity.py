import json
import math
import sys

import pytest

from mlxtune.metrics.loss import loss
from mlxtune.metrics.perplexity import perplexity


def test_perplexity_is_the_exponential_of_the_loss_and_its_interval() -> None:
    nats, tokens = [6.0, 1.0, 3.0], [3, 1, 4]
    score, of = perplexity(nats, tokens), loss(nats, tokens)
    assert score.value == pytest.approx(3.4903429574618414)  # e^1.25
    assert (score.ci_low, score.ci_high) == (math.exp(of.ci_low), math.exp(of.ci_high))
    assert (score.metric, score.unit, score.n, score.better) == ("perplexity", "", 3, "lower")


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens() -> None:
    assert perplexity([5 * math.log(512), 2 * math.log(512)], [5, 2]).value == pytest.approx(512)


def test_a_huge_loss_gives_a_number_that_json_can_write() -> None:
    score = perplexity([2000.0], [1])
    assert sys.float_info.max * 0.999 < score.value < math.inf
    json.dumps(score.to_dict(), allow_nan=False)


def test_rows_of_a_group_count_as_one() -> None:
    nats, tokens, groups = [6.0, 1.0, 3.0, 4.0], [3, 1, 4, 2], ["a", "a", "b", "c"]
    assert perplexity(nats, tokens, groups).ci_high == math.exp(loss(nats, tokens, groups).ci_high)
