"""Values become a recipe, or an error that names the key, the value and what to do."""

from typing import Any

import pytest

from mlxtune import recipe
from mlxtune.errors import RecipeError


def mistake(values: dict[str, Any], settings: dict[str, Any] | None = None) -> str:
    """The line of the error, without the name of the file that it must begin with."""
    with pytest.raises(RecipeError) as caught:
        recipe.build(values, where="my.yaml", settings=settings)
    assert caught.value.exit_code == 2
    line = str(caught.value)
    assert line.startswith(("my.yaml: ", "command line: "))
    return line.removeprefix("my.yaml: ")


def test_nothing_gives_the_defaults() -> None:
    assert recipe.build({}) == recipe.Recipe()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"modell": "x"}, "unknown key `modell`; did you mean `model`?"),
        ({"lora": {"rnk": 8}}, "unknown key `lora.rnk`; did you mean `lora.rank`?"),
        ({"trian": {"iters": 1}}, "unknown key `trian`; did you mean `train`?"),
        # in another section, by its flag's name, by what others call it
        ({"lora": {}, "iters": 100}, "unknown key `iters`; did you mean `train.iters`?"),
        ({"lora": {"learning_rate": 1}}, "unknown key `lora.learning_rate`; did you mean `train.learning_rate`?"),
        ({"q_bits": 4}, "unknown key `q_bits`; did you mean `quantize.bits`?"),
        ({"train": {"steps_per_eval": 5}}, "unknown key `train.steps_per_eval`; did you mean `train.eval_every`?"),
        ({"train": {"lr": 1e-4}}, "unknown key `train.lr`; did you mean `train.learning_rate`?"),
        ({"lora": {"keys": ["q_proj"]}}, "unknown key `lora.keys`; did you mean `lora.targets`?"),
        (
            {"quantize": {"zzzz": 1}},
            "unknown key `quantize.zzzz`; known here: bits, group_size, mode, method",
        ),
        (
            {1: 2},
            "unknown key `1`; known here: model, revision, seed, data, quantize, lora, train, evaluate, fuse, compare",
        ),
        # `lora` has a `method` too: the section at hand wins
        ({"quantize": {"method_": "rtn"}}, "unknown key `quantize.method_`; did you mean `quantize.method`?"),
    ],
)  # fmt: skip
def test_unknown_key(values: dict[str, Any], line: str) -> None:
    assert mistake(values) == line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"train": {"iters": "many"}}, "train.iters: is 'many', not a whole number or null"),
        ({"train": {"iters": 1.5}}, "train.iters: is 1.5, not a whole number or null"),
        ({"train": {"iters": True}}, "train.iters: is True, not a whole number or null"),
        ({"lora": {"scale": "1e-5"}}, "lora.scale: is '1e-5', not a number; write it without quotes"),
        ({"train": {"batch_size": "8"}}, "train.batch_size: is '8', not a whole number; write it without quotes"),
        ({"train": {"learning_rate": False}}, "train.learning_rate: is False, not a number or null"),
        ({"train": {"grad_checkpoint": 1}}, "train.grad_checkpoint: is 1, not true or false"),
        ({"train": {"grad_checkpoint": "yes please"}}, "train.grad_checkpoint: is 'yes please', not true or false"),
        ({"revision": 123}, "revision: is 123, not a text or null; put it in quotes"),
        ({"model": ["a"]}, "model: is ['a'], not a text"),
        ({"lora": {"targets": [1]}}, "lora.targets: is [1], not a list of texts"),
        ({"lora": {"targets": 1}}, "lora.targets: is 1, not a list of texts"),
        ({"data": {"keep": ["a"]}}, "data.keep: is ['a'], not a mapping of lists"),
        ({"data": {"keep": {"a": [1.5]}}}, "data.keep: is {'a': [1.5]}, not a mapping of lists"),
        ({"lora": 8}, "lora: is 8, not a section; write its keys indented below it"),
        ({"data": 8}, "data: is 8, not a section; write its keys indented below it"),
        ({"seed": "x" * 1000}, f"seed: is '{'x' * 76}…, not a whole number"),
    ],
)  # fmt: skip
def test_wrong_type(values: dict[str, Any], line: str) -> None:
    assert mistake(values) == line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"lora": {"rank": 0}}, "lora.rank: is 0; give at least 1"),
        ({"lora": {"scale": 0}}, "lora.scale: is 0.0; give more than 0"),
        ({"lora": {"dropout": 1}}, "lora.dropout: is 1.0; give at most 0.95"),
        ({"seed": -1}, "seed: is -1; give at least 0"),
        ({"seed": 2**63}, f"seed: is {2**63}; give at most {2**63 - 1}"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: is nan; give a finite number"),
        ({"train": {"learning_rate": float("-inf")}}, "train.learning_rate: is -inf; give a finite number"),
        ({"train": {"learning_rate": 10**400}}, "train.learning_rate: is inf; give a finite number"),
        (
            {"train": {"schedule": "cosin"}},
            "train.schedule: is 'cosin'; use one of cosine, linear, constant (did you mean cosine?)",
        ),
        ({"data": {"too_long": "cut"}}, "data.too_long: is 'cut'; use one of error, drop, truncate"),
        ({"quantize": {"bits": 7}}, "quantize.bits: no 7-bit format; use 2, 3, 4, 5, 6 or 8"),
        ({"quantize": {"group_size": 48}}, "quantize.group_size: no groups of 48; use 32, 64 or 128"),
        (
            {"quantize": {"mode": "mxfp4", "bits": 8}},
            "quantize.mode: mxfp4 has 4 bits in groups of 32, not 8 in 32; leave bits and group_size out",
        ),
        ({"fuse": {"bits": 7}}, "fuse.bits: no 7-bit format; use 2, 3, 4, 5, 6 or 8"),
        ({"evaluate": {"label": "*"}}, "evaluate.label: is no regular expression: nothing to repeat at position 0"),
        ({"evaluate": {"label": "a"}}, r"evaluate.label: has no group in parentheses; e.g. '^(\w+)'"),
        ({"lora": {"num_layers": 0}}, "lora.num_layers: is 0; give at least 1, or -1 for all"),
        ({"lora": {"targets": []}}, "lora.targets: is empty; leave it out to adapt all linear layers"),
        ({"data": {"test": 0.5, "valid": 0.5}}, "data: test 0.5 + valid 0.5 leave no rows to train on"),
        ({"data": {"prompt": "{a}"}}, "data: prompt and completion belong together; set both or none"),
        ({"train": {"iters": 1, "epochs": 1}}, "train: iters and epochs are both set; keep one of them"),
        ({"fuse": {"bits": 8, "dequantize": True}}, "fuse: bits and dequantize exclude each other; keep one of them"),
        ({"lora": {"alpha": 8, "scale": 2}}, "lora: alpha and scale are both set; keep one of them"),
        ({"lora": {"alpha": 0}}, "lora.alpha: is 0.0; give more than 0"),
        ({"lora": {"alpha": 8, "rank": 0}}, "lora.rank: is 0; give at least 1"),
    ],
)  # fmt: skip
def test_out_of_range(values: dict[str, Any], line: str) -> None:
    assert mistake(values) == line


def test_null() -> None:
    assert mistake({"lora": {"rank": None}}) == "lora.rank: is null; give a whole number"
    assert mistake({"train": None}) == "train: is empty; leave the section out or give it keys"
    made = recipe.build({"quantize": None, "revision": None, "train": {"max_grad_norm": None, "iters": None}})
    assert made.quantize is None
    assert made.revision is None
    assert made.train.max_grad_norm is None
    assert made.train.iters is None


def test_what_people_write() -> None:
    made = recipe.build(
        {
            "data": "rows.jsonl",
            "lora": {"rank": 8, "alpha": 32, "targets": "q_proj"},
            "train": {"epochs": 2, "learning_rate": 1, "save_every": 1e2},
            "quantize": {},
        }
    )
    assert made.data == recipe.DataRecipe(path="rows.jsonl")
    assert made.lora == recipe.LoraRecipe(rank=8, scale=4.0, targets=["q_proj"])
    assert (made.train.epochs, made.train.learning_rate, made.train.save_every) == (2.0, 1.0, 100)
    assert [type(value) for value in (made.train.epochs, made.train.save_every)] == [float, int]
    assert made.quantize == recipe.QuantizeRecipe()
    kept = recipe.build({"data": {"keep": {"a": "one", "b": [1, 2], 3: [True]}}}).data.keep
    assert kept == {"a": ["one"], "b": ["1", "2"], "3": ["True"]}


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "method"),
    [("mxfp4", 4, 32, "search"), ("nvfp4", 4, 16, "search"), ("mxfp8", 8, 32, "rtn")],
)
def test_a_mode_with_one_format_brings_it(mode: str, bits: int, group_size: int, method: str) -> None:
    made = recipe.build({"quantize": {"mode": mode}}).quantize
    assert made == recipe.QuantizeRecipe(bits=bits, group_size=group_size, mode=mode, method=method)


def test_settings_win_over_the_file() -> None:
    made = recipe.build(
        {"model": "a", "lora": {"rank": 4, "dropout": 0.1}, "quantize": None},
        settings={"model": "b", "lora.rank": 2, "quantize.bits": 8, "data.path": "d", "train.iters": 1e1},
    )
    assert made.model == "b"
    assert made.lora == recipe.LoraRecipe(rank=2, dropout=0.1)
    assert made.quantize == recipe.QuantizeRecipe(bits=8)
    assert made.data.path == "d"
    assert made.train.iters == 10


def test_settings_replace_whole_sections() -> None:
    file = {"quantize": {"bits": 8}, "lora": {"rank": 4, "dropout": 0.1}, "data": {"path": "d", "test": 0.3}}
    made = recipe.build(file, settings={"quantize": None, "lora": {"rank": 2}, "lora.scale": 3, "data": "other"})
    assert made.quantize is None
    assert made.lora == recipe.LoraRecipe(rank=2, scale=3.0)
    assert made.data == recipe.DataRecipe(path="other")
    assert file == {"quantize": {"bits": 8}, "lora": {"rank": 4, "dropout": 0.1}, "data": {"path": "d", "test": 0.3}}


def test_a_setting_removes_what_it_excludes_from_the_file() -> None:
    """`mlxtune run configs/quickstart.yaml --iters 20`: the file's epochs make way."""
    assert recipe.build({"train": {"epochs": 3}}, settings={"train.iters": 20}).train.epochs is None
    assert recipe.build({"train": {"iters": 20}}, settings={"train.epochs": 3}).train.iters is None
    assert recipe.build({"fuse": {"bits": 8}}, settings={"fuse.dequantize": True}).fuse.bits is None
    assert recipe.build({"fuse": {"bits": 8}}, settings={"fuse.dequantize": False}).fuse.bits == 8
    assert recipe.build({"lora": {"scale": 9, "rank": 4}}, settings={"lora.alpha": 8}).lora.scale == 2
    assert recipe.build({"lora": {"alpha": 8, "rank": 4}}, settings={"lora.rank": 8}).lora.scale == 1
    assert recipe.build({"lora": {"alpha": 8, "rank": 4}}, settings={"lora.scale": 5}).lora.scale == 5


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lora.rank": 0}, "command line: lora.rank: is 0; give at least 1"),
        ({"lora.rnk": 1}, "command line: unknown key `lora.rnk`; did you mean `lora.rank`?"),
        ({"trian.iters": 1}, "command line: unknown key `trian.iters`; did you mean `train.iters`?"),
        ({"iters": 1}, "command line: unknown key `iters`; did you mean `train.iters`?"),
        ({"lora.rank.x": 1}, "command line: unknown key `lora.rank.x`; did you mean `lora.rank`?"),
        (
            {"": 1},
            "command line: unknown key ``; known here: "
            "model, revision, seed, data, quantize, lora, train, evaluate, fuse, compare",
        ),
        ({"train.iters": 1, "train.epochs": 1}, "train: iters and epochs are both set; keep one of them"),
    ],
)
def test_a_wrong_setting_is_not_blamed_on_the_file(settings: dict[str, Any], line: str) -> None:
    assert mistake({}, settings) == line


def test_auto_turns_on_its_switch() -> None:
    made = recipe.build({"train": {"batch_size": "auto", "grad_accumulation_steps": 2}})
    assert made.train == recipe.TrainRecipe(fit_batch=True, grad_accumulation_steps=2)
    assert recipe.build(recipe.to_dict(made)) == made
    assert recipe.build(
        {"train": {"batch_size": 32}}, settings={"train.batch_size": "auto"}
    ).train == recipe.TrainRecipe(batch_size=32, fit_batch=True)
    assert recipe.build(
        {"train": {"batch_size": "auto"}}, settings={"train.batch_size": 4}
    ).train == recipe.TrainRecipe(batch_size=4)
    both = {"train.batch_size": 4, "train.fit_batch": True}
    assert recipe.build({}, settings=both).train == recipe.TrainRecipe(batch_size=4, fit_batch=True)
