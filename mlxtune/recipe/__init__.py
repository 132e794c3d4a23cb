"""The recipe: every setting of a run. YAML, flags and `--set` in, YAML out.

`settings` has the fields, `build` checks values, `files` reads and writes YAML, `mlx_lm` reads mlx-lm's files.
"""

from mlxtune.recipe.build import build, check_quantization, differences
from mlxtune.recipe.files import dump, load, parse_yaml, read_yaml, reference, to_dict
from mlxtune.recipe.settings import (
    CompareRecipe,
    DataRecipe,
    EvaluateRecipe,
    FuseRecipe,
    LoraRecipe,
    QuantizeRecipe,
    Recipe,
    TrainRecipe,
    all_settings,
    fields_of,
    section_type,
)

__all__ = [
    "CompareRecipe",
    "DataRecipe",
    "EvaluateRecipe",
    "FuseRecipe",
    "LoraRecipe",
    "QuantizeRecipe",
    "Recipe",
    "TrainRecipe",
    "all_settings",
    "build",
    "check_quantization",
    "differences",
    "dump",
    "fields_of",
    "load",
    "parse_yaml",
    "read_yaml",
    "reference",
    "section_type",
    "to_dict",
]
