"""What a network writes: as likely as it says, and the same from the same seed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.quant import own_text
from tests import zoo


def test_rows() -> None:
    net = zoo.build("llama")
    net.train()
    rows = own_text.write(net, 3, 12, 7, 0)
    assert net.training
    assert [len(row.tokens) for row in rows] == [12] * 3 and {row.tokens[0] for row in rows} == {7}
    assert len({tuple(row.tokens) for row in rows}) == 3
    assert [row.tokens for row in own_text.write(net, 3, 12, 7, 0)] == [row.tokens for row in rows]
    assert [row.tokens for row in own_text.write(net, 3, 12, 7, 1)] != [row.tokens for row in rows]


def test_tokens_are_drawn_as_predicted() -> None:
    net = zoo.build("llama", vocab_size=16)
    net.lm_head.weight = 40 * net.lm_head.weight  # so that tokens differ in how likely they are
    expected = np.array(mx.softmax(net(mx.array([[7]]))[0, 0]), dtype=np.float64)
    assert expected.max() > 0.15
    drawn = [row.tokens[1] for row in own_text.write(net, 4000, 2, 7, 0)]
    shares = np.bincount(drawn, minlength=16) / 4000
    assert (np.abs(shares - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-3).all()
    assert isinstance(net, nn.Module)
