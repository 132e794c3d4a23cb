"""Malformed claims of quantization: `convert` refuses each in one line, with nothing left behind."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune import model
from mlxtune.cli import main
from tests.spoil import Spoil, both, refused, set_json, set_tensor

AGAIN = "; download the model again"
ORIGINAL = "; start from the original model, or from one that was quantized for MLX"

# what stands for ~ differs
MALFORMED: dict[str, tuple[Spoil, str]] = {
    # what is said of other tools' quantization
    **{
        f"quantized by {method}": (
            set_json("config.json", quantization_config={"quant_method": method}),
            f"DIR: is quantized by '{method}', which is not supported" + ORIGINAL,
        )
        for method in ("gptq", "bitsandbytes", "hqq", "aqlm")
    },
    "quantized by nobody": (
        set_json("config.json", quantization_config={"bits": 4}),
        "DIR/config.json: has a quantization_config that names no quant_method" + AGAIN,
    ),
    "quantized in words": (
        set_json("config.json", quantization_config="awq"),
        "DIR/config.json: has a quantization_config that names no quant_method" + AGAIN,
    ),
    "AWQ of 3 bits": (
        set_json("config.json", quantization_config={"quant_method": "awq", "bits": 3, "group_size": 64}),
        "DIR/config.json: is quantized by AWQ with bits = 3, group_size = 64, version = 'gemm'; "
        "supported are 4, groups of 32, 64 or 128, and gemm" + ORIGINAL,
    ),
    "AWQ in another layout": (
        set_json("config.json", quantization_config={"quant_method": "awq", "bits": 4, "version": "gemv"}),
        "DIR/config.json: is quantized by AWQ with bits = 4, group_size = 128, version = 'gemv'; "
        "supported are 4, groups of 32, 64 or 128, and gemm" + ORIGINAL,
    ),
    "AWQ of nothing": (
        set_json("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "DIR/config.json: claims to be quantized by AWQ, but no tensor is" + AGAIN,
    ),
    "compressed in whole numbers": (
        set_json("config.json", quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        "DIR: is quantized by compressed-tensors ('pack-quantized'), which is not supported for 'llama'" + ORIGINAL,
    ),
    "8-bit floats that are none": (
        set_json("config.json", quantization_config={"quant_method": "fp8"}),
        "DIR/config.json: claims 8-bit floats, but no tensor is of them" + AGAIN,
    ),
    # what is said of MLX's own
    "claims to be quantized": (
        set_json("config.json", quantization={"bits": 4, "group_size": 64}),
        "DIR/config.json: claims to be quantized, but no tensor is" + AGAIN,
    ),
}

UP = "model.layers.1.mlp.up_proj"


def claim(**values: Any) -> Spoil:
    return set_json("config.json", quantization={"bits": 4, "group_size": 64, "mode": "affine"} | values)


# of the embedded model in 4 bits, groups of 64
MALFORMED_PACKED: dict[str, tuple[Spoil, str]] = {
    "no word of it": (
        set_json("config.json", quantization=None, quantization_config=None),
        "DIR/config.json: says nothing of the quantization of 'model.~'" + AGAIN,
    ),
    "a list": (
        set_json("config.json", quantization=[4, 64]),
        "DIR/config.json: has a quantization that is no group of settings" + AGAIN,
    ),
    "7 bits": (
        claim(bits=7),
        "DIR/config.json: has bits = 7 in 'quantization'; affine has 1, 2, 3, 4, 5, 6, 8" + AGAIN,
    ),
    "bits in words": (
        claim(bits="4"),
        "DIR/config.json: has bits = '4' in 'quantization'; affine has 1, 2, 3, 4, 5, 6, 8" + AGAIN,
    ),
    "no bits": (
        set_json("config.json", quantization={"group_size": 64}),
        "DIR/config.json: has bits = None in 'quantization'; affine has 1, 2, 3, 4, 5, 6, 8" + AGAIN,
    ),
    "groups of 48": (
        claim(group_size=48),
        "DIR/config.json: has group_size = 48 in 'quantization'; affine has 32, 64, 128" + AGAIN,
    ),
    "an unknown mode": (claim(mode="magic"), "DIR/config.json: has the unknown mode 'magic' in 'quantization'" + AGAIN),
    "a mode with other groups": (
        claim(mode="nvfp4"),
        "DIR/config.json: has group_size = 64 in 'quantization'; nvfp4 has 16" + AGAIN,
    ),
    "a layer of 9 bits": (
        claim(**{UP: {"bits": 9, "group_size": 64}}),
        f"DIR/config.json: has bits = 9 in '{UP}'; affine has 1, 2, 3, 4, 5, 6, 8" + AGAIN,
    ),
    "8 bits that are 4": (claim(bits=8), "DIR/config.json: says 8 bits in groups of 64 of 'model.~" + AGAIN),
    "groups of 32 that are 64": (
        claim(group_size=32),
        "DIR/config.json: says 4 bits in groups of 32 of 'model.~" + AGAIN,
    ),
    "8 bits in groups of 32, which have the shape of 4 in 64": (
        claim(bits=8, group_size=32),
        "DIR/config.json: says 8 bits in groups of 32 of model.~, whose tensors have 4 bits in groups of 64" + AGAIN,
    ),
    "mxfp4 that is affine": (
        claim(mode="mxfp4", group_size=32),
        "DIR/config.json: says 4 bits in groups of 32 (mxfp4) of 'model.~" + AGAIN,
    ),
    "a layer with a claim of its own that is not so": (
        claim(**{UP: {"bits": 3, "group_size": 64}}),
        f"DIR/config.json: says 3 bits in groups of 64 of '{UP}', whose tensors are weight U32 [512, 24], "
        "scales F32 [512, 3], biases F32 [512, 3]" + AGAIN,
    ),
    "a layer without biases": (
        set_tensor(f"{UP}.biases", None),
        f"DIR/config.json: says 4 bits in groups of 64 of '{UP}', whose tensors are weight U32 [512, 24], "
        "scales F32 [512, 3]" + AGAIN,
    ),
    "scales of fewer rows": (
        set_tensor(f"{UP}.scales", mx.zeros((511, 3))),
        f"DIR/config.json: says 4 bits in groups of 64 of '{UP}', whose tensors are weight U32 [512, 24], "
        "scales F32 [511, 3], biases F32 [512, 3]" + AGAIN,
    ),
    "scales in bytes": (
        set_tensor(f"{UP}.scales", mx.zeros((512, 3), mx.uint8)),
        f"DIR/config.json: says 4 bits in groups of 64 of '{UP}', whose tensors are weight U32 [512, 24], "
        "scales U8 [512, 3], biases F32 [512, 3]" + AGAIN,
    ),
    "biases of another shape": (
        set_tensor(f"{UP}.biases", mx.zeros((512, 4))),
        f"DIR/config.json: says 4 bits in groups of 64 of '{UP}', whose tensors are weight U32 [512, 24], "
        "scales F32 [512, 3], biases F32 [512, 4]" + AGAIN,
    ),
    "a weight in floats": (
        set_tensor(f"{UP}.weight", mx.zeros((512, 24))),
        f"DIR/config.json: says 4 bits in groups of 64 of '{UP}', whose tensors are weight F32 [512, 24], "
        "scales F32 [512, 3], biases F32 [512, 3]" + AGAIN,
    ),
    "a weight without scales": (
        both(set_tensor(f"{UP}.scales", None), set_tensor(f"{UP}.biases", None)),
        f"DIR: does not load: ~{UP}~" + AGAIN,
    ),
}


@pytest.fixture(scope="session")
def four_bits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 4 bits, groups of 64."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    lm = model.load(tiny, stored=True)
    nn.quantize(lm.net, 64, 4)
    folder.mkdir()
    model.save(folder, lm.net, lm.config | {"quantization": {"bits": 4, "group_size": 64, "mode": "affine"}}, tiny)
    (folder / model.INDEX).unlink()
    return folder


@pytest.mark.parametrize("name", MALFORMED)
def test_claims_of_other_tools_are_refused_in_a_line(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(tiny, *MALFORMED[name], tmp_path, capsys)


@pytest.mark.parametrize("name", MALFORMED_PACKED)
def test_claims_that_the_tensors_contradict_are_refused_in_a_line(
    name: str, four_bits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(four_bits, *MALFORMED_PACKED[name], tmp_path, capsys)


def test_what_is_not_spoiled_is_converted(four_bits: Path, tiny: Path, tmp_path: Path) -> None:
    for number, source in enumerate((tiny, four_bits)):
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(source), "--mlx-path", str(tmp_path / f"{number}")])
        assert caught.value.code == 0
        model.load(tmp_path / f"{number}")
