"""mlx-lm's LoRA YAML as the nested values of a recipe."""

from collections.abc import Mapping
from typing import Any

from mlxtune.errors import RecipeError
from mlxtune.recipe.build import unknown_key
from mlxtune.recipe.settings import Recipe, fields_of, section_type

# mlx-lm's own LoRA YAML: its key -> ours; None: it has no meaning here and is left out.
_KEYS: dict[str, str | None] = {
    "model": "model", "seed": "seed", "data": "data.path", "mask_prompt": "data.mask_prompt",
    "fine_tune_type": "lora.method", "num_layers": "lora.num_layers", "optimizer": "train.optimizer",
    "batch_size": "train.batch_size", "iters": "train.iters", "learning_rate": "train.learning_rate",
    "steps_per_report": "train.report_every", "steps_per_eval": "train.eval_every", "save_every": "train.save_every",
    "max_seq_length": "train.max_seq_length", "grad_checkpoint": "train.grad_checkpoint",
    "grad_accumulation_steps": "train.grad_accumulation_steps",
    "train": None, "test": None, "val_batches": None, "test_batches": None, "adapter_path": None,
    "clear_cache_threshold": None, "report_to": None, "project_name": None, "config": None, "trust_remote_code": None,
    "lora_parameters": None, "lr_schedule": None, "optimizer_config": None, "resume_adapter_file": None,  # read apart
}  # fmt: skip
_IN_BATCHES = ("iters", "steps_per_report", "steps_per_eval", "save_every")
_SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}


def is_mlx_lm(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is laid out as mlx-lm's LoRA YAML: flat keys that a recipe has only inside sections."""
    sections = {each.name for each, hint in fields_of(Recipe) if section_type(hint) is not None}
    if any(isinstance(values.get(name), Mapping) for name in sections):
        return False
    flat = {key for key, ours in _KEYS.items() if ours is None or "." in ours} - sections
    return bool(flat & set(values)) or isinstance(values.get("train"), bool)


def from_mlx_lm(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested values of a recipe from mlx-lm's LoRA YAML; what it leaves out has this package's defaults.

    mlx-lm counts `iters` and the like in batches, a recipe in optimizer updates: they are divided by the
    accumulation. Without `lr_schedule` the learning rate is constant; with one, its first argument is the peak, and
    the course ends at 0 with the last update. Raises RecipeError for a key that mlx-lm does not have, or that would
    change the result and has no counterpart.
    """
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _KEYS:
            raise unknown_key(str(key), dict.fromkeys(_KEYS), "", where)
        if value is not None:
            _put(made, _KEYS[key], value)
    if values.get("resume_adapter_file") is not None:
        raise RecipeError("is not supported", where=f"{where}: resume_adapter_file", hint="remove it")
    accumulation = _whole(values.get("grad_accumulation_steps"))
    for key in _IN_BATCHES:
        batches = _whole(values.get(key))
        if accumulation is not None and accumulation > 1 and batches is not None and batches > 0:
            _put(made, _KEYS[key], max(1, batches // accumulation))
    for key, value in _mapping(values, "lora_parameters", where).items():
        _put(made, "lora.targets" if key == "keys" else f"lora.{key}", value)
    for key, value in _mapping(_mapping(values, "optimizer_config", where), _optimizer(values), where).items():
        if key == "weight_decay":
            _put(made, "train.weight_decay", value)
        elif key != "bias_correction":
            raise RecipeError(f"{key} is not supported", where=f"{where}: optimizer_config", hint="remove it")
    _put_schedule(made, values, where)
    return made


def _put(made: dict[str, Any], key: str | None, value: Any) -> None:
    if key is not None:
        section, _, name = key.rpartition(".")
        (made.setdefault(section, {}) if section else made)[name] = value


def _whole(value: Any) -> int | None:
    """A whole number, also as `1e3`; None for anything else, which `build` refuses."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if isinstance(value, int) or value.is_integer() else None


def _optimizer(values: Mapping[str, Any]) -> str:
    return str(values.get("optimizer") or "adam")


def _mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The mapping below `key`, empty where there is none."""
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise RecipeError(f"is {found!r}, not a mapping", where=f"{where}: {key}", hint="write `key: value` lines")
    return found


def _put_schedule(made: dict[str, Any], values: Mapping[str, Any], where: str) -> None:
    schedule = _mapping(values, "lr_schedule", where)
    if not schedule:
        _put(made, "train.schedule", "constant")
        _put(made, "train.warmup", 0)
        return
    name = str(schedule.get("name"))
    if name not in _SCHEDULES:
        known = " or ".join(_SCHEDULES)
        raise RecipeError(f"unknown schedule {name!r}", where=f"{where}: lr_schedule.name", hint=f"use {known}")
    arguments = schedule.get("arguments")
    if not isinstance(arguments, list) or not arguments:
        raise RecipeError("is no list", where=f"{where}: lr_schedule.arguments", hint="begin it with the peak")
    _put(made, "train.schedule", _SCHEDULES[name])
    _put(made, "train.learning_rate", arguments[0])
    _put(made, "train.warmup", schedule.get("warmup", 0))
