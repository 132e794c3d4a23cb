"""Recipes as YAML: what is read, what is refused and where, and that what is written reads back the same."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxtune import recipe
from mlxtune.errors import RecipeError


def read(folder: Path, text: str | bytes) -> recipe.Recipe:
    file = folder / "my.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return recipe.load(file)


def mistake(folder: Path, text: str | bytes) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.e-4", 2e-4), (".5e-3", 5e-4), ("1e3", 1000.0), ("1_0e2", 1000.0), ("3", 3.0)],
)
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    assert read(tmp_path, f"train: {{learning_rate: {text}}}").train.learning_rate == value


def test_a_text_that_only_looks_like_one_stays_a_text(tmp_path: Path) -> None:
    assert read(tmp_path, "revision: '1e5'\nmodel: e5").revision == "1e5"
    assert read(tmp_path, "model: 1e5x").model == "1e5x"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: a: b", "my.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("seed: 1\nlora:\n\trank: 8", "my.yaml:3: not valid YAML: found character '\\t' that cannot start any token"),
        ("lora: [", "my.yaml:1: not valid YAML: expected the node content, but found '<stream end>'"),
        ("seed: 1\nmodel: x\nseed: 2\n", "my.yaml:3: not valid YAML: key `seed` twice"),
        ("lora:\n  rank: 1\n  rank: 2\n", "my.yaml:3: not valid YAML: key `rank` twice"),
        ("? [a]\n: 1\n", "my.yaml:1: not valid YAML: found unhashable key"),
        ("model: !mine x", "my.yaml:1: not valid YAML: could not determine a constructor for the tag '!mine'"),
        ("model: a\n---\nmodel: b\n", "my.yaml:2: not valid YAML: but found another document"),
        ("revision: 2024-13-45", "my.yaml: not valid YAML: month must be in 1..12"),
        ("revision: 2024-12-31", "my.yaml: revision: is 2024-12-31, not a text or null; put it in quotes"),
        ("- model", "my.yaml: is a list, not a mapping; write `key: value` lines"),
        ("tickets.jsonl", "my.yaml: is a single value, not a mapping; write `key: value` lines"),
        (b"model: \xff\n", "my.yaml: is not UTF-8; save the file as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_not_a_recipe(tmp_path: Path, text: str | bytes, line: str) -> None:
    assert mistake(tmp_path, text) == line


def test_brackets_without_end(tmp_path: Path) -> None:
    assert mistake(tmp_path, "a: " + "[" * 20_000).startswith("my.yaml: not valid YAML: maximum recursion depth")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent.yaml: no such recipe; give the path of a YAML file$"):
        recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r": cannot be read: Is a directory$"):
        recipe.load(tmp_path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n") == recipe.Recipe()
    assert read(tmp_path, "\ufeffseed: 3\n") == recipe.Recipe(seed=3)


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = "lora: &a {rank: 3, scale: 1}\nquantize: &b {bits: 8}\ntrain: {iters: 1}\n"
    assert read(tmp_path, text).lora == recipe.LoraRecipe(rank=3, scale=1.0)
    merged = recipe.parse_yaml("a: &a {rank: 3, scale: 1}\nb: {<<: *a, rank: 4}", where="text")
    assert merged["b"] == {"rank": 4, "scale": 1}


# Texts that YAML might read as something else, or fold, or refuse to print as they are.
ODD_TEXTS = [
    "1e5",
    "1.5E-3",
    "null",
    "yes",
    "0x1f",
    "1:30",
    "2024-01-01",
    "",
    " a ",
    "a\n\nb ",
    "# a",
    "é\u2028\x85\x07",
    "a\u2028b\x85c",
    "🙂",
]
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))


def plain(each: dataclasses.Field[Any], hint: Any) -> st.SearchStrategy[Any]:
    """Values that one setting may have."""
    low, high, above, choices = (each.metadata[name] for name in ("low", "high", "above", "choices"))
    drawn: list[st.SearchStrategy[Any]] = []
    for kind in typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,):
        if kind is type(None):
            drawn.append(st.none())
        elif choices:
            drawn.append(st.sampled_from(choices))
        elif kind is bool:
            drawn.append(st.booleans())
        elif kind is int:
            drawn.append(st.integers(0 if low is None else int(low), 2**40 if high is None else int(high)))
        elif kind is float:
            least = above if low is None else low
            drawn.append(st.floats(least, high, exclude_min=above is not None, allow_nan=False, allow_infinity=False))
        elif kind is str:
            drawn.append(texts)
        elif kind == list[int]:
            drawn.append(st.lists(st.sampled_from([2, 3, 4, 8]), max_size=3))
        elif kind == list[str]:
            drawn.append(st.lists(texts, min_size=1, max_size=3))
        else:
            drawn.append(st.dictionaries(texts, st.lists(texts, max_size=3), max_size=2))
    return st.one_of(drawn)


def section(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={each.name: plain(each, hint) for each, hint in recipe.fields_of(cls)})


@st.composite
def recipes(draw: st.DrawFn) -> recipe.Recipe:
    """Any recipe that the rules allow: drawn field by field, and what two fields may not be together is mended."""
    values: dict[str, Any] = {}
    for each, hint in recipe.fields_of(recipe.Recipe):
        inner = recipe.section_type(hint)
        values[each.name] = draw(plain(each, hint) if inner is None else section(inner))
    data, train, fuse, quantize = (values[name] for name in ("data", "train", "fuse", "quantize"))
    data["test"], data["valid"] = data.get("test", 0.1) / 2, data.get("valid", 0.1) / 2
    if (data.get("prompt") is None) != (data.get("completion") is None):
        data["prompt"] = data["completion"] = "{a}"
    values["lora"]["num_layers"] = draw(st.sampled_from([-1, 1, 2**40]))
    if train.get("iters") is not None:
        train["epochs"] = None
    fuse["bits"] = draw(st.sampled_from([None, 2, 3, 4, 5, 6, 8]))
    fuse["dequantize"] = fuse["bits"] is None and fuse.get("dequantize", False)
    quantize["group_size"], quantize["bits"] = draw(st.sampled_from([32, 64, 128])), draw(st.sampled_from([2, 4, 8]))
    if quantize.get("mode", "affine") != "affine":
        del quantize["group_size"], quantize["bits"]
        quantize.pop("method", None)  # few go with a mode
    values["evaluate"]["label"] = draw(st.sampled_from([None, r"^(\w+)", "(a)\n", "'(\")"]))
    values["evaluate"]["pattern"] = draw(st.sampled_from([None, r"\w+"]))
    train["report_to"] = draw(st.lists(st.sampled_from(["tensorboard", "wandb"])))
    if draw(st.booleans()) or values["lora"].get("method") == "full":
        values["quantize"] = None
    return recipe.build(values)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(made=recipes())
def test_what_is_written_reads_back_the_same(tmp_path: Path, made: recipe.Recipe) -> None:
    assert read(tmp_path, recipe.dump(made)) == made


def test_what_is_written_reads_back_the_same_with_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, recipe.dump(recipe.Recipe())) == recipe.Recipe()
    assert list(yaml.safe_load(recipe.dump(recipe.Recipe()))) == [
        "model", "revision", "seed", "data", "quantize", "lora", "train", "evaluate", "fuse",
            "compare",
    ]  # fmt: skip


def test_the_reference_has_every_setting_with_its_default(tmp_path: Path) -> None:
    text = recipe.reference()
    assert read(tmp_path, text) == recipe.Recipe()
    # with the commented section taken in, nothing is left that only the code knows
    whole = "\n".join(line[1:].replace("  ", " ", 1) if line.startswith("#   ") else line for line in text.split("\n"))
    values = yaml.safe_load(whole.replace("quantize: null", "quantize:"))
    keys = {
        name if not isinstance(value, dict) else f"{name}.{key}"
        for name, value in values.items()
        for key in (value if isinstance(value, dict) else [name])
    }
    assert keys == set(recipe.all_settings())
    assert read(tmp_path, whole.replace("quantize: null", "quantize:")).quantize == recipe.QuantizeRecipe()
    for name, (each, _) in recipe.all_settings().items():
        lines = [line for line in text.split("\n") if line.lstrip("# ").startswith(f"{name.rsplit('.', 1)[-1]}: ")]
        assert any(each.metadata["help"] in line for line in lines), name
