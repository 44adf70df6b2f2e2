"""Say when the provider retires a model, or its fast mode: days from the price table, and one sentence. Pure.

Promises the same sentence everywhere: in `check`, `doctor`, `explain`, the alerts, and the note on the provider's own 404.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from gateway_addon.pricing.table import Prices

NOTICE_S = 30 * 86_400
"""How long before its day a retirement is announced."""


@dataclass(frozen=True, slots=True)
class Retirement:
    """The end of a model, or of its fast mode."""

    model: str
    fast: bool
    day: str
    """UTC; empty where it is long past."""

    @property
    def what(self) -> str:
        return f"fast mode on {self.model}" if self.fast else self.model

    @property
    def starts_at(self) -> float:
        """Return the start of the retirement, in unix seconds."""
        return datetime.fromisoformat(self.day).replace(tzinfo=UTC).timestamp() if self.day else float("-inf")

    def is_past(self, at: float) -> bool:
        return at >= self.starts_at

    def is_near(self, at: float) -> bool:
        """Return whether the retirement is to be announced, and still to come."""
        return 0 < self.starts_at - at <= NOTICE_S

    def sentence(self, at: float) -> str:
        """Return the sentence for a moment, without a full stop."""
        if not self.is_past(at):
            return f"the provider retires {self.what} on {self.day}"
        return f"the provider retired {self.what} on {self.day}" if self.day else f"the provider has retired {self.what}"


def retirements(prices: Prices, at: float) -> tuple[Retirement, ...]:
    """Return every end that the table knows, past ones too."""
    found = []
    for model in prices.models():
        row = prices.row(model, at)
        if row is not None and row.retired is not None:
            found.append(Retirement(model, False, row.retired))
        if row is not None and row.fast_retired is not None:
            found.append(Retirement(model, True, row.fast_retired))
    return tuple(found)


def retired(prices: Prices, model: str, at: float, *, fast: bool) -> str | None:
    """Return why the provider refuses a request for this model (`fast`: in fast mode), as a sentence; None where it serves it."""
    canonical = prices.canonical(model)
    for each in retirements(prices, at):
        if each.model == canonical and each.is_past(at) and (fast or not each.fast):
            return f"{each.sentence(at)}; ask for another model" + (", or without speed: fast" if each.fast else "")
    return None
