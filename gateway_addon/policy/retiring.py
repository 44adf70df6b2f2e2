"""Find the apps that a retirement concerns: those that may use a model that the provider stops to serve. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from gateway_addon.names import app_named
from gateway_addon.policy.model import AppPolicy, GatewayPolicy
from gateway_addon.policy.rules import matching, may_use
from gateway_addon.pricing import Prices, Retirement, retirements


@dataclass(frozen=True, slots=True)
class Retiring:
    """One app, and the models it may use that retire or have retired."""

    app: str
    file: str
    what: Retirement

    def sentence(self, now: float) -> str:
        """Say it with the place where the app's models are named, without a full stop."""
        return f"{app_named(self.app)} may use {self.what.what}, and {self.what.sentence(now)}: ask for another ({self.file} models)"


def retiring(policy: GatewayPolicy, now: float) -> tuple[Retiring, ...]:
    """Return, by app, the models that retire within a month and the named ones that have retired.

    A pattern that also matches a model in service does not name the retired ones: it needs no change.
    """
    ends = retirements(policy.prices, now)
    return tuple(Retiring(app.name, app.file, each) for app in policy.apps.values() for each in _concerning(app, policy.prices, ends, now))


def _concerning(app: AppPolicy, prices: Prices, ends: tuple[Retirement, ...], now: float) -> Iterator[Retirement]:
    gone = {each.model for each in ends if not each.fast and each.is_past(now)}
    fast = {model for model in prices.models() if (row := prices.row(model, now)) and row.fast}
    slow_now = gone | {each.model for each in ends if each.fast and each.is_past(now)}
    named = set().union(*(means for pattern in _named(app) if (means := matching(pattern, prices)) <= gone))
    for each in ends:
        if not _may_use(app, each.model, prices) or (each.fast and ("fast" not in app.features or each.model in gone)):
            continue
        only_slow = all(model in slow_now for model in fast if _may_use(app, model, prices))
        if each.is_near(now) or (each.is_past(now) and (only_slow if each.fast else each.model in named)):
            yield each


def _named(app: AppPolicy) -> tuple[str, ...]:
    fallbacks = app.features.get("fallbacks")
    return (*app.models.allow, *app.models.aliases.values(), *(fallbacks.default if fallbacks else ()))


def _may_use(app: AppPolicy, model: str, prices: Prices) -> bool:
    """Return whether an app may use a model: by its own id, or by the dated id of a moving name."""
    return may_use(app, model, prices) or ((dated := prices.snapshot(model)) is not None and may_use(app, dated, prices))
