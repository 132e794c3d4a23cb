"""The table of settings: complete, consistent, and spelt as mlx-lm's users know it."""

import dataclasses
import typing
from typing import Any

from mlxtune import recipe

# The flags that mlx-lm's users bring along, and the settings behind them.
MLX_LM_FLAGS = {
    "--model": "model", "--data": "data.path", "--mask-prompt": "data.mask_prompt", "--seed": "seed",
    "--num-layers": "lora.num_layers", "--fine-tune-type": "lora.method", "--iters": "train.iters",
    "--batch-size": "train.batch_size", "--learning-rate": "train.learning_rate", "--optimizer": "train.optimizer",
    "--max-seq-length": "train.max_seq_length", "--grad-checkpoint": "train.grad_checkpoint",
    "--grad-accumulation-steps": "train.grad_accumulation_steps", "--steps-per-report": "train.report_every",
    "--steps-per-eval": "train.eval_every", "--save-every": "train.save_every", "--q-bits": "quantize.bits",
    "--q-group-size": "quantize.group_size", "--q-mode": "quantize.mode",
}  # fmt: skip


def test_flags() -> None:
    flags = {each.metadata["flag"]: name for name, (each, _) in recipe.all_settings().items() if each.metadata["flag"]}
    assert MLX_LM_FLAGS.items() <= flags.items()
    assert len(flags) == sum(each.metadata["flag"] is not None for each, _ in recipe.all_settings().values())


def test_defaults_pass_their_own_checks() -> None:
    values = recipe.to_dict(recipe.Recipe(quantize=recipe.QuantizeRecipe()))
    assert recipe.build(values) == recipe.Recipe(quantize=recipe.QuantizeRecipe())


def test_each_setting_has_a_help_in_one_line() -> None:
    for name, (each, hint) in recipe.all_settings().items():
        text = each.metadata["help"]
        assert text and "\n" not in text and not text.endswith("."), name
        assert len(text) <= 110, name
        assert each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING, name
        assert hint in (str, int, float, bool, list[str], list[int], dict[str, list[str]], dict[str, Any]) or type(
            None
        ) in typing.get_args(hint)


def test_sections() -> None:
    sections = {
        each.name: recipe.section_type(hint)
        for each, hint in recipe.fields_of(recipe.Recipe)
        if recipe.section_type(hint)
    }
    assert sections == {
        "data": recipe.DataRecipe,
        "quantize": recipe.QuantizeRecipe,
        "lora": recipe.LoraRecipe,
        "train": recipe.TrainRecipe,
        "evaluate": recipe.EvaluateRecipe,
        "fuse": recipe.FuseRecipe,
        "compare": recipe.CompareRecipe,
    }
    assert all(name.split(".")[0] in {*sections, "model", "revision", "seed"} for name in recipe.all_settings())


def test_lists_and_mappings_are_not_shared_between_recipes() -> None:
    first, second = recipe.Recipe(), recipe.Recipe()
    assert first.lora.targets is not second.lora.targets
    assert first.data.keep is not second.data.keep
