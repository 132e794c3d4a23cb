"""One measured figure with its interval."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over `n` rows with its 95 % interval; `better` says which way is good."""

    metric: str
    value: float
    unit: str
    ci_low: float
    ci_high: float
    n: int
    better: Literal["higher", "lower"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
