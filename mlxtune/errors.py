"""Every deliberate error of mlxtune and its exit code. Knows nothing of terminals: `cli` prints the line.

MlxtuneError            1   something failed
├── TrainingError       1   training stopped: NaN, nothing to train
│   └── WorkerLost      1   another worker of the run has ended
├── FuseError           1   fusing would lose what was learned
├── InputError          2   bad input or usage
│   ├── RecipeError     2   a recipe's key, type or range
│   ├── DataError       2   a row, a file, an empty set
│   ├── ModelError      2   a model, tokenizer or adapter folder
│   ├── OutputError     2   the output exists already, or lies where it must not
│   └── MemoryShort     2   what is asked for does not fit into memory
├── StorageError        3   disk or network
│   └── HubError        3   the model hub: missing, gated, unreachable
├── TrustError          4   the model asks to run code of its own
└── Interrupted       130   a signal ended the work after a checkpoint (128 + signal)
"""

from pathlib import Path


class MlxtuneError(Exception):
    """A mistake or failure that one line can explain.

    `where` names the place (a file, `file:line`, or a recipe key such as `lora.rank`); `hint` says what to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str | None = None):
        super().__init__(what)
        self.what = what
        self.where = str(where) if where is not None else None
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.hint:
            line = f"{line}; {self.hint}"
        return " ".join(line.split())


class TrainingError(MlxtuneError):
    """Training stopped before its end."""


class WorkerLost(TrainingError):
    """Another worker of the run has ended, or the workers do not meet."""


class FuseError(MlxtuneError):
    """The fused model would not keep what the adapter learned."""


class InputError(MlxtuneError):
    """Bad input or usage."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe's key, type or range is wrong."""


class DataError(InputError):
    """A data file or a row of it is wrong."""


class ModelError(InputError):
    """A model, tokenizer or adapter folder is wrong."""


class OutputError(InputError):
    """The output exists already, or may not be written there."""


class MemoryShort(InputError):
    """What is asked for does not fit into this machine's memory."""


class StorageError(MlxtuneError):
    """Disk or network failed."""

    exit_code = 3


class HubError(StorageError):
    """The model hub could not give what was asked."""


class TrustError(MlxtuneError):
    """The model asks to run code of its own."""

    exit_code = 4


class Interrupted(MlxtuneError):
    """A signal ended the work; what was done is saved."""

    def __init__(self, what: str, *, signal_number: int, hint: str | None = None):
        super().__init__(what, hint=hint)
        self.exit_code = 128 + signal_number
