"""mlx-lm's LoRA YAML as the nested values of a recipe."""

from collections.abc import Mapping
from typing import Any

from mlxtune.errors import RecipeError
from mlxtune.recipe.build import unknown_key
from mlxtune.recipe.settings import LoraRecipe

# mlx-lm's own LoRA YAML: its key -> ours; None: it has no meaning here and is left out.
_MLX_LM_KEYS: dict[str, str | None] = {
    "model": "model", "seed": "seed", "data": "data.path", "mask_prompt": "data.mask_prompt",
    "fine_tune_type": "lora.method", "num_layers": "lora.num_layers", "optimizer": "train.optimizer",
    "batch_size": "train.batch_size", "iters": "train.iters", "learning_rate": "train.learning_rate",
    "steps_per_report": "train.report_every", "steps_per_eval": "train.eval_every", "save_every": "train.save_every",
    "max_seq_length": "train.max_seq_length", "grad_checkpoint": "train.grad_checkpoint",
    "grad_accumulation_steps": "train.grad_accumulation_steps",
    "train": None, "test": None, "val_batches": None, "test_batches": None, "adapter_path": None,
    "resume_adapter_file": None, "clear_cache_threshold": None, "report_to": None, "project_name": None,
    "config": None, "trust_remote_code": None, "optimizer_config": None,
    "lora_parameters": None, "lr_schedule": None,  # read apart below
}  # fmt: skip


def is_mlx_lm(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is laid out as mlx-lm's LoRA YAML: flat keys that a recipe has only inside sections."""
    flat = {key for key, ours in _MLX_LM_KEYS.items() if ours is None or "." in ours} - {"data", "train"}
    return bool(flat & set(values)) or isinstance(values.get("train"), bool) or isinstance(values.get("data"), str)


def from_mlx_lm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of a recipe from mlx-lm's LoRA YAML. `alpha` becomes `scale = alpha / rank`.

    mlx-lm's `iters` counts batches; here it counts optimizer updates, so it is divided by the accumulation.
    """
    made: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        section, _, name = key.rpartition(".")
        (made.setdefault(section, {}) if section else made)[name] = value

    for key, value in values.items():
        if key not in _MLX_LM_KEYS:
            known = {name: None for name in _MLX_LM_KEYS}
            raise unknown_key(key, known, "", "mlx-lm recipe")
        ours = _MLX_LM_KEYS[key]
        if ours is not None and value is not None:
            put(ours, value)
    accumulation = values.get("grad_accumulation_steps")
    if isinstance(accumulation, int) and accumulation > 1 and isinstance(values.get("iters"), int):
        put("train.iters", max(1, values["iters"] // accumulation))
    parameters = dict(values.get("lora_parameters") or {})
    if "alpha" in parameters:
        alpha, rank = parameters.pop("alpha"), parameters.get("rank", LoraRecipe().rank)
        if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
            raise RecipeError(f"alpha {alpha!r} and rank {rank!r} are no numbers", where="lora_parameters")
        parameters["scale"] = alpha / rank
    if "keys" in parameters:
        parameters["targets"] = parameters.pop("keys")
    for key, value in parameters.items():
        put(f"lora.{key}", value)
    schedule = values.get("lr_schedule")
    if schedule is not None:
        name = str(schedule.get("name", "")) if isinstance(schedule, Mapping) else str(schedule)
        courses = {"cosine_decay": "cosine", "linear_schedule": "linear", "constant": "constant"}
        if name not in courses:
            raise RecipeError(
                f"unknown schedule {name!r}", where="lr_schedule.name", hint=f"use one of {', '.join(courses)}"
            )
        put("train.schedule", courses[name])
        put("train.warmup", float(schedule.get("warmup", 0)) if isinstance(schedule, Mapping) else 0.0)
    else:
        put("train.schedule", "constant")
        put("train.warmup", 0.0)
    return made
