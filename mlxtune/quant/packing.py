"""How weights lie in groups of few bits, as MLX packs them. Knows arrays, not how their values were chosen.

A row of I weights in groups of G is I codes of `bits` bits, little end first in uint32 words, and a scale and, in the
affine mode, a bias for each group: a weight is scale · code + bias.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

WORD = 32  # bits


@dataclass(frozen=True, slots=True)
class Packing:
    """Bits of a weight, weights of a group, and the number format: affine, mxfp4, mxfp8 or nvfp4."""

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def described(self) -> dict[str, Any]:
        """As a model's config says it, and as MLX's functions take it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True, slots=True)
class Packed:
    """weight (..., O, I·bits/32) uint32; scales and biases (..., O, I/G), biases None where the mode has none."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None


def dequantized(packed: Packed, packing: Packing) -> mx.array:
    """The values (..., O, I) in float32, whatever the scales are stored in."""
    scales, biases = packed.scales, packed.biases
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(packed.weight, scales, biases, **packing.described, dtype=mx.float32)


def words_of(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., I) below 2^bits, I a multiple of 32 -> words (..., I·bits/32) uint32, little end first."""
    lead = codes.shape[:-1]
    return words_down(codes.reshape(-1, codes.shape[-1]).T, bits).T.reshape(*lead, -1)


def words_down(codes: mx.array, bits: int) -> mx.array:
    """As `words_of`, of codes (I, N) that lie in columns -> words (I·bits/32, N)."""
    inside = codes.astype(mx.uint32).reshape(-1, WORD, codes.shape[-1])  # of each of which `bits` words are made
    words: list[mx.array | None] = [None] * bits
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = inside[:, place]
        _into(words, word, code << shift if shift else code)
        if shift + bits > WORD:
            _into(words, word + 1, code >> (WORD - shift))
    return mx.stack([each for each in words if each is not None], axis=1).reshape(-1, codes.shape[-1])


def _into(words: list[mx.array | None], number: int, code: mx.array) -> None:
    word = words[number]
    words[number] = code if word is None else word | code


def codes_of(words: mx.array, bits: int) -> mx.array:
    """Words (..., I·bits/32) uint32 -> codes (..., I) uint32: what `words_of` packed."""
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        codes = (words[..., None] >> mx.arange(0, WORD, bits, dtype=mx.uint32)) & mask
        return codes.reshape(*words.shape[:-1], -1)
    inside = words.reshape(*words.shape[:-1], -1, bits)
    found: list[mx.array] = []
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = inside[..., word] >> shift
        if shift + bits > WORD:
            code = code | (inside[..., word + 1] << (WORD - shift))
        found.append(code & mask)
    return mx.stack(found, axis=-1).reshape(*words.shape[:-1], -1)
