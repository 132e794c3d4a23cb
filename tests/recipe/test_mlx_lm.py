"""mlx-lm's LoRA YAML: its documented keys become a recipe that means the same."""

from pathlib import Path

import pytest

from mlxtune import recipe
from mlxtune.errors import RecipeError

# Every key that `mlx_lm.lora --config` reads, with values of its own documentation.
WHOLE = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config: {adamw: {weight_decay: 0.02}, adam: {betas: [0.9, 0.95]}}
data: "/path/to/training/data"
seed: 7
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
report_to: wandb
project_name: mine
steps_per_report: 10
steps_per_eval: 200
grad_accumulation_steps: 4
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 1024
grad_checkpoint: true
mask_prompt: true
clear_cache_threshold: 0
trust_remote_code: false
config: null
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [2e-5, 1000, 1e-7]
"""


def read(folder: Path, text: str) -> recipe.Recipe:
    (folder / "lora.yaml").write_text(text)
    return recipe.load(folder / "lora.yaml")


def mistake(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    return str(caught.value).removeprefix(f"{folder}/")


def test_every_key(tmp_path: Path) -> None:
    assert read(tmp_path, WHOLE) == recipe.Recipe(
        model="mlx_model",
        seed=7,
        data=recipe.DataRecipe(path="/path/to/training/data", mask_prompt=True),
        lora=recipe.LoraRecipe(
            rank=8, scale=20.0, dropout=0.1, targets=["self_attn.q_proj", "self_attn.v_proj"], num_layers=16
        ),
        train=recipe.TrainRecipe(
            iters=250,  # optimizer updates: 1000 batches, four an update
            batch_size=4,
            grad_accumulation_steps=4,
            learning_rate=2e-5,  # the schedule's peak, as in mlx-lm
            schedule="cosine",
            warmup=100.0,
            optimizer="adamw",
            weight_decay=0.02,
            max_seq_length=1024,
            eval_every=50,
            save_every=25,
            report_every=2,
            grad_checkpoint=True,
        ),
    )


def test_the_table_has_every_key_of_the_installed_mlx_lm(tmp_path: Path) -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    from mlxtune.recipe import mlx_lm

    assert set(CONFIG_DEFAULTS) == set(mlx_lm._KEYS)


def test_without_a_schedule_the_rate_is_constant(tmp_path: Path) -> None:
    train = read(tmp_path, "learning_rate: 1e-4\niters: 10\n").train
    assert (train.schedule, train.warmup, train.learning_rate, train.iters) == ("constant", 0.0, 1e-4, 10)
    train = read(tmp_path, "iters: 10\nlr_schedule: {name: linear_schedule, arguments: [1e-3, 0, 10]}\n").train
    assert (train.schedule, train.warmup, train.learning_rate) == ("linear", 0.0, 1e-3)


def test_alpha_becomes_scale(tmp_path: Path) -> None:
    assert read(tmp_path, "lora_parameters: {rank: 8, alpha: 16}").lora == recipe.LoraRecipe(rank=8, scale=2.0)
    assert read(tmp_path, "lora_parameters: {alpha: 32}").lora == recipe.LoraRecipe(rank=16, scale=2.0)


def test_accumulation_at_least_one_update(tmp_path: Path) -> None:
    assert read(tmp_path, "iters: 3\ngrad_accumulation_steps: 4").train.iters == 1
    assert read(tmp_path, "iters: 1e3\ngrad_accumulation_steps: 8").train.iters == 125


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("iters: 1\nlearning_rat: 1", "lora.yaml: unknown key `learning_rat`; did you mean `learning_rate`?"),
        ("iters: 1\n3: 1", "lora.yaml: unknown key `3`; known here: model, seed, data, mask_prompt, "),
        ("iters: 0", "lora.yaml: train.iters: is 0; give at least 1"),
        ("iters: 0\ngrad_accumulation_steps: 4", "lora.yaml: train.iters: is 0; give at least 1"),
        ("iters: x\ngrad_accumulation_steps: 4", "lora.yaml: train.iters: is 'x', not a whole number or null"),
        ("fine_tune_type: ia3", "lora.yaml: lora.method: is 'ia3'; use one of lora, dora, full"),
        ("lora_parameters: 3", "lora.yaml: lora_parameters: is 3, not a mapping; write `key: value` lines"),
        ("lora_parameters: {rnk: 3}", "lora.yaml: unknown key `lora.rnk`; did you mean `lora.rank`?"),
        ("lora_parameters: {rank: 0, alpha: 8}", "lora.yaml: lora.rank: is 0; give at least 1"),
        ("lr_schedule: cosine", "lora.yaml: lr_schedule: is 'cosine', not a mapping; write `key: value` lines"),
        (
            "lr_schedule: {name: step_decay, arguments: [1]}",
            "lora.yaml: lr_schedule.name: unknown schedule 'step_decay'; use cosine_decay or linear_schedule",
        ),
        ("lr_schedule: {name: cosine_decay}", "lora.yaml: lr_schedule.arguments: is no list; begin it with the peak"),
        ("resume_adapter_file: a.safetensors", "lora.yaml: resume_adapter_file: is not supported; remove it"),
        (
            "optimizer: adam\noptimizer_config: {adam: {betas: [0.9, 0.95]}}",
            "lora.yaml: optimizer_config: betas is not supported; remove it",
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, line: str) -> None:
    assert mistake(tmp_path, text).startswith(line)


@pytest.mark.parametrize(
    "text", ["model: tiny\ndata: rows.jsonl\nseed: 1\n", "data: rows.jsonl\nlora: {rank: 8}\n", "train: {iters: 5}\n"]
)
def test_a_recipe_is_not_taken_for_one(tmp_path: Path, text: str) -> None:
    made = read(tmp_path, text)
    assert (made.train.schedule, made.train.warmup) == ("cosine", 0.05)


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    """Nothing of `train` is dropped in silence because a flat key stands beside it."""
    line = mistake(tmp_path, "train: {iters: 5}\nlora_parameters: {rank: 8}\n")
    assert line == "lora.yaml: unknown key `lora_parameters`; did you mean `lora`?"
