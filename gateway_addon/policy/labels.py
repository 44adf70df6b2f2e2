"""Judge the labels that a request carries, and say which of them count. Pure.

Promises that a token's own labels always count, that another label counts only where the app's policy declares it, from a place that
the policy names and with a value that it allows, and that a name said twice counts once.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from gateway_addon.messages.labels import HEADER_PREFIX, SaidLabel
from gateway_addon.messages.request import MESSAGES, ParsedRequest
from gateway_addon.policy.model import AppPolicy, LabelPolicy

PLACES = {"header": f"in a header ({HEADER_PREFIX}NAME)", "path": "in the path (/l/NAME=VALUE)", "token": "on its token alone"}
SPENDING = (*MESSAGES, "batches.create")
"""The endpoints whose requests need the labels that an app's policy requires."""


def labels_in_force(app: AppPolicy, parsed: ParsedRequest) -> tuple[tuple[str, str], ...]:
    """Return the labels by which a request is booked, by name: its token's, and those that it says and may say."""
    if not parsed.labels:
        return parsed.fixed_labels
    fixed = dict(parsed.fixed_labels)
    said = {label.name: label.value for label in reversed(parsed.labels) if _problem(app, parsed, label) is None}
    return tuple(sorted((said | fixed).items()))


def verdicts(app: AppPolicy, parsed: ParsedRequest) -> Iterator[tuple[str, bool]]:
    """Yield a sentence for each label that is said, fixed or required, and whether it refuses the request."""
    for label in parsed.labels:
        problem = _problem(app, parsed, label)
        dropped = problem is not None and label.name not in app.labels and app.undeclared_labels == "drop"
        yield problem or f"{label.name} is {label.value}", problem is not None and not dropped
    yield from ((f"{name} is {value}, by the token", False) for name, value in parsed.fixed_labels)
    carried = {label.name for label in parsed.labels} | {name for name, _ in parsed.fixed_labels}
    for name, rule in app.labels.items() if parsed.endpoint in SPENDING else ():
        if rule.required and name not in carried:
            yield f"{app} must say its label {name} with each call, {_places(name, rule)} ({app.file} labels.{name})", True


def _problem(app: AppPolicy, parsed: ParsedRequest, label: SaidLabel) -> str | None:
    """Return why a label may not be said so, None where it may, or where the token's own value stands in any case."""
    if label.name in dict(parsed.fixed_labels):
        return None
    rule = app.labels.get(label.name)
    if rule is None:
        declared = ", ".join(app.labels) or "none"
        drop = "declare it there, or write undeclared_labels: drop"
        return f"{app} has no label {label.name!r}; declared: {declared} ({app.file} labels); {drop}"
    if label.source not in rule.sources:
        allowed = _places(label.name, rule)
        return f"{app} says its label {label.name} {allowed}, not in its {label.source} ({app.file} labels.{label.name}.from)"
    if not any(fnmatchcase(label.value, pattern) for pattern in rule.values):
        allowed = ", ".join(rule.values)
        return f"{app} may not say {label.name}={label.value}; allowed: {allowed} ({app.file} labels.{label.name}.values)"
    others = {other.value for other in parsed.labels if other.name == label.name}
    if len(others) > 1:
        return f"{app} says its label {label.name} twice, as {' and '.join(sorted(others))}; say it once"
    return None


def _places(name: str, rule: LabelPolicy) -> str:
    return " or ".join(PLACES[source].replace("NAME", name) for source in rule.sources)
