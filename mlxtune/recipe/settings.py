"""Every setting of a run: its type, default, range and help, written once.

Knows names, not what they do: files and models are checked by those who open them.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

OPTIMIZERS = (
    "adamw", "adam", "sgd", "adafactor", "muon", "lion", "adamax", "adagrad", "adadelta", "rmsprop",
)  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
QUANTIZATION_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
CALIBRATED = ("imatrix", "gptq", "dwq", "awq")  # methods that look at what goes into the layers


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    flag: str | None = None,
    auto: str | None = None,
) -> Any:
    """A field of the recipe: default, help, the allowed range (`low <= v <= high`, `v > above`), and its flag.

    `auto` is the dotted key of a switch that the value `auto` turns on, while the field itself stays as it is.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "choices": choices, "flag": flag, "auto": auto}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecipe:
    path: str | None = setting(
        None, "file of examples, or folder of train, valid and test files; `tickets` is the embedded set", flag="--data"
    )
    prompt: str | None = setting(None, "column of the prompt, or a Jinja text of columns: 'Ticket: {{ text }}'")
    completion: str | None = setting(None, "column of the answer, or a Jinja text of columns: '{{ label }}'")
    chat_template: str | None = setting(None, "Jinja text of a conversation; null: the tokenizer's own template")
    keep: dict[str, list[str]] = setting({}, "keep only rows whose column has one of these values: {column: [values]}")
    test: float = setting(0.1, "share of rows held out for the evaluation when one file is split", low=0, high=0.9)
    valid: float = setting(0.1, "share of rows held out to choose the best adapter", low=0, high=0.9)
    group_by: str | None = setting(None, "column whose equal values stay on one side of the split")
    mask_prompt: bool = setting(True, "learn the answers only; false: every token", flag="--mask-prompt")
    learn: str = setting("all", "which answers of a conversation are learned", choices=("all", "last"))
    too_long: str = setting(
        "error",
        "rows over train.max_seq_length: refuse them, leave them out, or cut their prompts from the left",
        choices=("error", "drop", "truncate"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeRecipe:
    bits: int = setting(4, "bits per weight: 2, 3, 4, 5, 6 or 8", low=2, high=8, flag="--q-bits")
    group_size: int = setting(
        64, "weights that share one scale: 32, 64 or 128", low=16, high=128, flag="--q-group-size"
    )
    mode: str = setting("affine", "number format", choices=QUANTIZATION_MODES, flag="--q-mode")
    method: str = setting(
        "search",
        "how values are chosen; search: least squares, rtn: nearest; from rows of data: imatrix, gptq, dwq, awq",
        choices=("search", "rtn", *CALIBRATED),
        flag="--q-method",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRecipe:
    method: str = setting(
        "lora",
        "what is trained: a low-rank adapter, one with magnitudes (dora), or all weights (full)",
        choices=("lora", "dora", "full"),
        flag="--fine-tune-type",
    )
    rank: int = setting(16, "rank of the update", low=1)
    scale: float = setting(2.0, "factor on the update (alpha / rank)", above=0)
    rslora: bool = setting(False, "divide alpha by the root of the rank instead: scale times the root of the rank")
    plus: float | None = setting(None, "LoRA+: learning rate of B as a multiple of that of A; null: the same", above=0)
    dropout: float = setting(0.0, "share of adapter inputs zeroed while training", low=0, high=0.95)
    targets: list[str] = setting(
        ["all-linear"], "layers that get an adapter: all-linear, attention, mlp, names or patterns such as *_proj"
    )
    num_layers: int = setting(-1, "number of last blocks that get adapters; -1: all", low=-1, flag="--num-layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRecipe:
    iters: int | None = setting(None, "optimizer updates; null: by epochs", low=1, flag="--iters")
    epochs: float | None = setting(None, "passes over the rows; null: 3 unless iters is set", above=0, flag="--epochs")
    batch_size: int = setting(
        8, "rows a batch; auto: as many as fit, see fit_batch", low=1, flag="--batch-size", auto="train.fit_batch"
    )
    fit_batch: bool = setting(
        False, "split an update's rows (batch_size x grad_accumulation_steps) into the largest batches that fit"
    )
    grad_accumulation_steps: int = setting(1, "batches an optimizer update", low=1, flag="--grad-accumulation-steps")
    learning_rate: float | None = setting(
        None, "peak learning rate; null: 2e-4, more for narrow models, less for full", above=0, flag="--learning-rate"
    )
    schedule: str = setting("cosine", "course after the warm-up", choices=("cosine", "linear", "constant"))
    warmup: float = setting(0.05, "warm-up: a share of the updates below 1, else a number of updates", low=0)
    optimizer: str = setting("adamw", "optimizer", choices=OPTIMIZERS, flag="--optimizer")
    optimizer_options: dict[str, Any] = setting({}, "further options of the optimizer by name, such as {eps: 1e-7}")
    weight_decay: float = setting(0.0, "decoupled weight decay, where the optimizer has it", low=0)
    max_grad_norm: float | None = setting(1.0, "gradients are scaled down to this norm; null: never", above=0)
    neftune: float | None = setting(
        None, "NEFTune: strength of the noise on the embeddings while training, such as 5; null: none", above=0
    )
    max_seq_length: int = setting(2048, "longest row in tokens", low=2, flag="--max-seq-length")
    packing: str = setting(
        "auto", "several short rows in a line, kept apart; auto: where that is faster", choices=("auto", "on", "off")
    )
    share_prefix: str = setting(
        "auto",
        "compute the tokens that all rows begin with once a batch; auto: where that is faster",
        choices=("auto", "on", "off"),
    )
    eval_every: int | None = setting(
        None, "updates between validations; null: ten a run", low=1, flag="--steps-per-eval"
    )
    patience: int | None = setting(None, "validations without a better loss before training stops; null: never", low=1)
    min_delta: float = setting(0.0, "how much lower a validation loss must be to count as better", low=0)
    anchor: str | None = setting(None, "a text file of what the model must not forget, measured at each validation")
    forget_budget: float = setting(
        0.1, "how far the loss on the anchor may rise, in nats per token, for an adapter to be kept as the best", low=0
    )
    show_answer: bool = setting(True, "answer the first validation row at each validation, to see it learn")
    report_to: list[str] = setting([], "also send the log to: tensorboard, wandb, mlflow, trackio", flag="--report-to")
    save_every: int = setting(100, "updates between checkpoints", low=1, flag="--save-every")
    report_every: int = setting(10, "updates between lines of the log", low=1, flag="--steps-per-report")
    grad_checkpoint: bool = setting(
        False, "save memory: recompute blocks in the backward pass", flag="--grad-checkpoint"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRecipe:
    max_tokens: int = setting(128, "longest greedy answer in tokens", low=1)
    batch_size: int = setting(32, "rows scored at once", low=1)
    label: str | None = setting(
        None, "regular expression; its first group, found in an answer, is the label that `accuracy` compares"
    )
    labels: list[str] = setting(
        [],
        "labels that are scored by their log-probabilities; empty: those of the training rows where `label` is set",
    )
    target_precision: float = setting(
        0.95, "precision at which the share of rows that the model can answer alone is measured", above=0, high=1
    )
    metrics: list[str] = setting(["auto"], "what is scored; auto: what suits the rows' answers")
    schema: str | None = setting(None, "a JSON schema file that answers must conform to")
    pattern: str | None = setting(None, "regular expression that a whole answer must match")


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseRecipe:
    bits: int | None = setting(None, "bits of the fused layers; null: as the base", low=2, high=8)
    dequantize: bool = setting(False, "write full-precision weights", flag="--dequantize")
    original: bool = setting(False, "fuse into the weights that the base was quantized from, and quantize them again")
    scale: float = setting(1.0, "strength: factor on what the adapter adds", low=0, high=4)
    keep: float = setting(0.9, "least share of the adapter's gain that fusing must keep", low=0, high=1)
    aim: float = setting(0.95, "share of the gain below which the worst layers get more bits", low=0, high=1)
    max_bpw: float | None = setting(
        None, "bits per weight that this may reach; null: half a bit more than without", above=0, high=32
    )
    accept_loss: bool = setting(False, "write the model even if it keeps less than `keep`")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareRecipe:
    prompt: str | None = setting(
        None,
        "the best prompt for the base: a system message, or a Jinja text of {{ prompt }}; null: one that names labels",
    )
    few_shot: int = setting(4, "training rows shown in the prompt; 0: no such candidate", low=0, high=64)
    examples: str = setting(
        "nearest", "which rows are shown: like the one asked, or the same for all", choices=("nearest", "fixed")
    )
    retrieval: bool = setting(True, "passages found by BM25 in the prompt, from the training rows or `documents`")
    documents: str | None = setting(None, "a folder of text files to retrieve from; null: the training rows")
    passages: int = setting(3, "retrieved passages in a prompt", low=1, high=50)
    widths: list[int] = setting([], "bits of further fused models to compare, such as [8, 3]")
    models: list[str] = setting([], "further candidates: folders or hub ids, each with an adapter as MODEL+ADAPTER")
    endpoint: str | None = setting(None, "the URL of an OpenAI-compatible server as a further candidate")
    endpoint_model: str | None = setting(None, "the model that the endpoint is asked for")
    anchor: str | None = setting(None, "a text file to measure forgetting on; null: an embedded text")
    choices: str | None = setting(None, "a file of multiple-choice questions to measure forgetting on")
    judge: str | None = setting(None, "a model or an endpoint's URL that compares answers in pairs; null: none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    model: str = setting("tiny", "folder, hub id, or `tiny`, the embedded base", flag="--model")
    revision: str | None = setting(None, "branch, tag or commit of a hub id", flag="--revision")
    seed: int = setting(0, "seed of every random choice", low=0, high=2**63 - 1, flag="--seed")
    data: DataRecipe = field(default_factory=DataRecipe, metadata={"help": "the examples"})
    quantize: QuantizeRecipe | None = field(default=None, metadata={"help": "quantize the base first; null: do not"})
    lora: LoraRecipe = field(default_factory=LoraRecipe, metadata={"help": "the adapter"})
    train: TrainRecipe = field(default_factory=TrainRecipe, metadata={"help": "the training"})
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe, metadata={"help": "the evaluation"})
    fuse: FuseRecipe = field(default_factory=FuseRecipe, metadata={"help": "fusing the adapter into the base"})
    compare: CompareRecipe | None = field(
        default_factory=CompareRecipe,
        metadata={"help": "was tuning worth it? against prompts and retrieval; null: not asked"},
    )


def fields_of(section: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Each field of a section with its resolved type."""
    hints = typing.get_type_hints(section)
    for each in dataclasses.fields(section):
        yield each, hints[each.name]


def section_type(hint: Any) -> type | None:
    """The section class inside `hint` (`X` or `X | None`), or None for a plain setting."""
    for option in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option)
    return None


def all_settings() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Every setting by its dotted key."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for each, hint in fields_of(Recipe):
        inner = section_type(hint)
        if inner is None:
            found[each.name] = (each, hint)
        else:
            found.update({f"{each.name}.{sub.name}": (sub, subhint) for sub, subhint in fields_of(inner)})
    return found
