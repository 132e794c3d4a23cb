"""Packing against MLX's own: the same words for the same codes, and values in float32."""

import mlx.core as mx
import numpy as np
import pytest

from mlxtune.quant.packing import Packed, Packing, codes_of, dequantized, words_of

BITS = (2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 96)])
def test_words_are_those_that_mlx_reads(bits: int, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint32)
    codes[..., 0], codes[..., -1] = 2**bits - 1, 0
    words = words_of(mx.array(codes), bits)
    assert words.dtype == mx.uint32 and words.shape == (*shape[:-1], shape[-1] * bits // 32)
    ones = mx.ones((*shape[:-1], shape[-1] // 32))
    read = mx.dequantize(words, ones, mx.zeros_like(ones), group_size=32, bits=bits)
    assert (np.array(read) == codes).all()
    assert (np.array(codes_of(words, bits)) == codes).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_mlx_packed_is_unpacked_and_packed_again(bits: int) -> None:
    words, *_ = mx.quantize(mx.random.normal((7, 128), key=mx.random.key(bits)), group_size=64, bits=bits)
    assert mx.array_equal(words_of(codes_of(words, bits), bits), words)


def test_values_are_computed_in_float32() -> None:
    weight = mx.random.normal((4, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    words, scales, biases = mx.quantize(weight, group_size=32, bits=4)
    found = dequantized(Packed(words, scales, biases), Packing(4, 32))
    codes = np.array(codes_of(words, 4), dtype=np.float64).reshape(4, 2, 32)
    scale, bias = (np.array(each.astype(mx.float32), dtype=np.float64)[..., None] for each in (scales, biases))
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found).reshape(4, 2, 32), scale * codes + bias, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_modes_without_biases(mode: str, bits: int, group_size: int) -> None:
    weight = mx.random.normal((4, 64), key=mx.random.key(1))
    packed = Packed(*mx.quantize(weight, mode=mode), None)
    packing = Packing(bits, group_size, mode)
    assert packing.described == {"group_size": group_size, "bits": bits, "mode": mode}
    expected = mx.dequantize(packed.weight, packed.scales, mode=mode, dtype=mx.float32)
    assert mx.array_equal(dequantized(packed, packing), expected)
