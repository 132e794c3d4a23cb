"""What a training run tells: a line of its log, and all of it at the end. Knows figures, not networks."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxtune.rundir import append_line


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLog:
    """One line of the log. Losses in nats per supervised token; speed in supervised tokens per second.

    `anchor_loss` is that of the text that must not be forgotten, `answer` the first validation row's at this point.
    """

    step: int
    train_loss: float
    valid_loss: float | None
    learning_rate: float
    tokens_per_second: float
    peak_memory_gb: float
    anchor_loss: float | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What training did. `trained_tokens` counts supervised tokens, each time they are seen.

    `anchor_loss` is that of the best adapter on the text that must not be forgotten, `first_anchor_loss` the base's.
    """

    steps: int
    best_step: int
    first_valid_loss: float | None
    best_valid_loss: float | None
    last_train_loss: float
    trained_tokens: int
    rows: int
    epochs: float
    seconds: float
    tokens_per_second: float
    peak_memory_gb: float
    trainable_parameters: int
    parameters: int
    batch_size: int
    grad_accumulation_steps: int
    resumed_at: int | None
    stopped_early: bool
    first_anchor_loss: float | None
    anchor_loss: float | None


def append(log: Path, line: StepLog) -> int:
    """Adds a line to the log, without what it does not say; returns the log's size in bytes. Raises StorageError."""
    told = {name: value for name, value in asdict(line).items() if value is not None or name == "valid_loss"}
    return append_line(log, json.dumps(told))
