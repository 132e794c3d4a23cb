"""Flags come from the recipe's fields; file, flags and --set are laid over each other in this order."""

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest

from mlxtune import recipe
from mlxtune.cli import LazyGroup, group
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags
from mlxtune.errors import RecipeError


@click.command()
@config_flag
@recipe_flags("model", "seed", "data", "quantize", "lora", "train", "fuse")
def every(config: Path | None, sets: tuple[str, ...], **flags: Any) -> recipe.Recipe:
    return build_recipe(config, flags, sets)


def parsed(*args: str) -> recipe.Recipe:
    made: recipe.Recipe = every.main(list(args), standalone_mode=False)
    return made


def mistake(*args: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parsed(*args)
    return str(caught.value)


def test_without_flags_all_is_default() -> None:
    assert parsed() == recipe.Recipe()


def test_file_then_flags_then_set(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: file\nseed: 1\nlora: {rank: 1, dropout: 0.5}\ntrain: {batch_size: 1, epochs: 9}\n")
    made = parsed("-c", str(file), "--batch-size", "2", "--seed", "2", "--set", "seed=3", "--iters", "5")
    assert (made.model, made.seed, made.train.batch_size, made.lora.rank) == ("file", 3, 2, 1)
    assert (made.train.iters, made.train.epochs) == (5, None)
    assert made == recipe.build(
        {
            "model": "file",
            "seed": 3,
            "lora": {"rank": 1, "dropout": 0.5},
            "train": {"batch_size": 2, "iters": 5},
        }
    )


@pytest.mark.parametrize(
    ("args", "values"),
    [
        (["--data", "d", "--no-mask-prompt"], {"data": {"path": "d", "mask_prompt": False}}),
        (["--mask-prompt"], {"data": {"mask_prompt": True}}),
        (["--learning-rate", "1e-5", "--save-every", "9"], {"train": {"learning_rate": 1e-5, "save_every": 9}}),
        (["--q-bits", "8"], {"quantize": {"bits": 8}}),
        (["--batch-size", "auto"], {"train": {"fit_batch": True}}),
        (["--set", "train.batch_size=auto"], {"train": {"fit_batch": True}}),
        (["--q-mode", "mxfp4"], {"quantize": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}),
        (["--grad-checkpoint", "--num-layers", "2"], {"train": {"grad_checkpoint": True}, "lora": {"num_layers": 2}}),
        (["--dequantize"], {"fuse": {"dequantize": True}}),
        (["--set", "lora.targets=[q_proj, v_proj]"], {"lora": {"targets": ["q_proj", "v_proj"]}}),
        (["--set", "lora.targets=mlp"], {"lora": {"targets": ["mlp"]}}),
        (["--set", "lora.alpha=64"], {"lora": {"scale": 4}}),
        (["--set", "train.learning_rate=1e-5"], {"train": {"learning_rate": 1e-5}}),
        (["--set", "train.iters=1e3"], {"train": {"iters": 1000}}),
        (["--set", "train.max_grad_norm=null"], {"train": {"max_grad_norm": None}}),
        (["--set", "quantize={bits: 8, group_size: 32}"], {"quantize": {"bits": 8, "group_size": 32}}),
        (["--set", "quantize.bits=8", "--set", "quantize.group_size=32"], {"quantize": {"bits": 8, "group_size": 32}}),
        (["--q-bits", "8", "--set", "quantize=null"], {"quantize": {"bits": 8}}),
        (["--set", "data=rows.csv"], {"data": {"path": "rows.csv"}}),
        (["--set", "data.keep={kind: [a, b]}"], {"data": {"keep": {"kind": ["a", "b"]}}}),
        (["--set", " seed = 4 "], {"seed": 4}),
    ],
)  # fmt: skip
def test_each_form(args: list[str], values: dict[str, Any]) -> None:
    assert parsed(*args) == recipe.build(values)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("Ticket: {text}", "Ticket: {text}"),
        (" {label}", " {label}"),
        ("{a} # {b}", "{a} # {b}"),
        ("first\nsecond", "first\nsecond"),
        ('"first\\nsecond "', "first\nsecond "),
        ("'it''s'", "'it''s'"),
        ("' x'", " x"),
        ('"quoted" {a}', '"quoted" {a}'),
        ("123", "123"),
        ("a=b", "a=b"),
    ],
)
def test_a_text_stands_as_it_is_typed(typed: str, value: str) -> None:
    made = parsed("--set", f"data.prompt={typed}", "--set", "data.completion={x}")
    assert made.data.prompt == value
    assert made.data.completion == "{x}"


def test_a_text_is_removed_with_null(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("revision: main\nevaluate: {label: (a)}\n")
    for null in ("null", "", "~"):
        made = parsed("-c", str(file), "--set", f"revision={null}", "--set", f"evaluate.label={null}")
        assert made == recipe.Recipe()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--set", "lora.rank"], "--set lora.rank: has no `=`; write --set section.key=value"),
        (["--set", "lora.rank=a: b: c"], "--set lora.rank:1: not valid YAML: mapping values are not allowed here"),
        (["--set", "lora.rank=x"], "command line: lora.rank: is 'x', not a whole number"),
        (["--set", "lora.rnk=1"], "command line: unknown key `lora.rnk`; did you mean `lora.rank`?"),
        (["--set", "rank=1"], "command line: unknown key `rank`; did you mean `lora.rank`?"),
        (["--set", "loar.rank=1"], "command line: unknown key `loar.rank`; did you mean `lora.rank`?"),
        (["--set", "model=null"], "command line: model: is null; give a text"),
        (["--set", "train=3"], "command line: train: is 3, not a section; write its keys indented below it"),
        (["--iters", "0"], "command line: train.iters: is 0; give at least 1"),
        (["--learning-rate", "nan"], "command line: train.learning_rate: is nan; give a finite number"),
        (["--q-mode", "int4"], "command line: quantize.mode: is 'int4'; use one of affine, mxfp4, nvfp4, mxfp8"),
        (["--iters", "1", "--epochs", "1"], "command line: train: iters and epochs are both set; keep one of them"),
    ],
)  # fmt: skip
def test_mistakes(args: list[str], line: str) -> None:
    assert mistake(*args) == line


def test_a_mistake_in_the_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("lora: {rank: 0}\n")
    assert mistake("-c", str(file), "--seed", "1") == f"{file}: lora.rank: is 0; give at least 1"
    assert parsed("-c", str(file), "--set", "lora.rank=1").lora.rank == 1


def test_help_shows_default_choices_and_the_settings_own_words() -> None:
    options = {option: param for param in every.params for option in param.opts}
    for name, (each, _) in recipe.all_settings().items():
        flag = each.metadata["flag"]
        if flag is None or name == "revision":
            continue
        option = options[flag]
        assert isinstance(option, click.Option)
        assert option.help is not None and option.help.startswith(each.metadata["help"]), name
        default = None if each.default is dataclasses.MISSING else each.default
        assert default is None or option.help.endswith(f"[{str(default).lower()}]"), name
        assert option.metavar == "|".join(each.metadata["choices"]) if each.metadata["choices"] else True
        assert option.default is None, "a default of the flag would hide the one of the file"


def test_commands_take_the_flags_that_the_contract_names() -> None:
    wanted = {
        "convert": "--mlx-path -q --quantize --q-bits --q-group-size --q-mode --dtype --revision",
        "quantize": "--mlx-path --q-bits --q-group-size --q-mode",
        "train": "-c --config --model --data --out --iters --batch-size --learning-rate --max-seq-length --seed --set "
        "--num-layers --mask-prompt --grad-checkpoint --grad-accumulation-steps --json",
        "evaluate": "-c --config --model --adapter-path --data --out --json",
        "fuse": "--model --adapter-path --save-path --q-bits --dequantize",
        "generate": "--model --adapter-path --prompt --max-tokens --temp --top-p --seed",
        "run": "--out --set --json",
        "doctor": "--json",
    }
    assert isinstance(group, LazyGroup)
    context = click.Context(group)
    for name, flags in wanted.items():
        command = group.get_command(context, name)
        assert command is not None
        has = {option for param in command.params for option in param.opts}
        assert set(flags.split()) <= has, name
