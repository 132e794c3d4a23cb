"""How far a training run is, and which adapter is the best so far. Knows losses and settings, not networks."""

from dataclasses import dataclass

from mlxtune.recipe import TrainRecipe

HIGH, HIGH_UPDATES = 2, 20  # a loss so many times its start, for so many updates in a row, is a divergence


@dataclass(slots=True)
class Progress:
    """What a checkpoint keeps beside the arrays. Losses in nats per supervised token.

    `waited`: validations since the best one; `high`: updates in a row whose loss was far above the first one's;
    `unlogged_…`: what the updates since the last line of the log add up to; `batch_size`: rows a batch, as it was
    chosen; `exhausted`: patience ended the training before its last update.
    """

    step: int = 0
    best_step: int = 0
    first_valid_loss: float | None = None
    best_valid_loss: float | None = None
    first_anchor_loss: float | None = None
    best_anchor_loss: float | None = None
    first_train_loss: float | None = None
    last_train_loss: float = 0.0
    waited: int = 0
    high: int = 0
    exhausted: bool = False
    trained_tokens: int = 0
    seconds: float = 0.0
    unlogged_nats: float = 0.0
    unlogged_tokens: int = 0
    unlogged_seconds: float = 0.0
    log_bytes: int = 0
    batch_size: int = 0

    def updated(self, loss: float, tokens: int, seconds: float) -> bool:
        """Counts an update; whether its loss has just been far above its start for too long."""
        self.step += 1
        self.trained_tokens += tokens
        self.seconds += seconds
        self.unlogged_nats += loss * tokens
        self.unlogged_tokens += tokens
        self.unlogged_seconds += seconds
        self.last_train_loss = loss
        if self.first_train_loss is None:
            self.first_train_loss = loss
        self.high = self.high + 1 if loss > HIGH * self.first_train_loss else 0
        return self.high == HIGH_UPDATES

    def logged(self, log_bytes: int) -> None:
        """Counts a line of the log, which is so long now."""
        self.log_bytes = log_bytes
        self.unlogged_nats, self.unlogged_tokens, self.unlogged_seconds = 0.0, 0, 0.0

    def validated(self, loss: float, anchor_loss: float | None, settings: TrainRecipe) -> bool:
        """Counts a validation; whether it is the best so far of those within the forgetting budget."""
        if self.first_valid_loss is None:
            self.first_valid_loss = loss
        best = self.best_valid_loss
        is_best = best is None or (loss < best and self._remembers(anchor_loss, settings))
        self.waited = 0 if is_best and (best is None or loss < best - settings.min_delta) else self.waited + 1
        if is_best:
            self.best_valid_loss, self.best_step, self.best_anchor_loss = loss, self.step, anchor_loss
        self.exhausted = settings.patience is not None and self.waited >= settings.patience
        return is_best

    def _remembers(self, anchor_loss: float | None, settings: TrainRecipe) -> bool:
        first = self.first_anchor_loss
        return first is None or anchor_loss is None or anchor_loss <= first + settings.forget_budget
