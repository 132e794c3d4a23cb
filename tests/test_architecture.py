"""Settings that networks are built from: what mlx-lm's architectures take is let through, what they do not is named."""

from pathlib import Path
from typing import Any, Optional, Union

import pytest

from mlxtune import architecture
from mlxtune.errors import ModelError
from tests import zoo

FILE = Path("config.json")


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_what_architectures_are_built_from_is_let_through(name: str) -> None:
    config: dict[str, Any] = {"model_type": name, **zoo.COMMON, **zoo.ARCHITECTURES[name]}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    if zoo.MULTIMODAL in config:
        config[zoo.MULTIMODAL] = {"model_type": name, **zoo.COMMON, **config[zoo.MULTIMODAL]}
    architecture.check(config, 1000, FILE)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [1, 1.5, None], ["1", True, [], {}, float("nan")]),
        (float, [1, float("inf")], ["1", False]),
        (bool, [True, 0, None], ["true", [], 2]),
        (str, ["a"], [1, ["a"]]),
        (dict[str, float], [{}], [[], "a"]),
        (list[int], [[]], [{}, 1]),
        (tuple[float, float], [[0.0, 1.0]], [1]),
        (Optional[int], [None, 2], ["2"]),  # noqa: UP045
        (Union[int, list], [2, [2]], ["2", {}]),  # noqa: UP007
        (int | None, [None, 2], ["2"]),
        (Any, [1, "a", []], []),
        (2, [1, "a"], []),  # as one of mlx-lm's is annotated
    ],
)
def test_types(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(architecture.accepts(hint, value) for value in good)
    assert not any(architecture.accepts(hint, value) for value in bad)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": "auto", "text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": {"text_config": "float16"}}, None),
        ({}, None),
    ],
)
def test_the_stored_precision_is_read_in_the_old_way_and_the_new(config: dict[str, Any], dtype: str | None) -> None:
    assert architecture.stored_dtype(config) == dtype


def test_the_text_models_settings_are_looked_at_too() -> None:
    config = {"model_type": "mistral3", "text_config": {"model_type": "llama", "hidden_size": "64"}}
    with pytest.raises(ModelError, match=r"has hidden_size = '64', which is no whole number above 0"):
        architecture.check(config, 10, FILE)


def test_architectures_by_the_name_of_their_class() -> None:
    config = {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]}
    assert architecture.arguments(config, FILE).__module__ == "mlx_lm.models.bailing_moe_v3"
