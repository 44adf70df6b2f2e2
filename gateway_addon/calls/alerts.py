"""Build the alerts for a person: a cap that fills up, a bill above its grant, another model than the one asked for, a key that
the provider does not take, an upstream that redirects, an issuer without keys, a policy that is not in force.

Promises that an alert holds no secret: names, amounts and places, never a value from a policy file, a header or a body. Each has a
`once`, by which the ledger has it delivered once over all processes. Pure; webhooks.py delivers them.
"""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from urllib.parse import urlsplit

from gateway_addon.ledger import TOTAL, Alert, Facts, Resolution, Standing, app_scope, enclosing, part_scope
from gateway_addon.ledger.reports.forecast import Forecast
from gateway_addon.ledger.scope import named_in_full
from gateway_addon.money import cents
from gateway_addon.names import PROGRAM, app_named, argument, safe_name
from gateway_addon.policy import Alerts, GatewayPolicy, Retiring, Source

THRESHOLDS_PERCENT = (50, 80, 95, 100)  # where the policy does not say
HOUR_S, DAY_S = 3600, 86_400


def rule(policy: GatewayPolicy, scope: str) -> Alerts:
    """Return the alert settings of a scope: those of the app's own policy, and of gateway.yaml where the app's has none."""
    common = policy.alerts
    app = policy.apps.get(enclosing(scope).removeprefix("app:")) if scope.startswith("app:") else None
    own = app.alerts if app is not None else common
    at_percent = own.at_percent or common.at_percent or THRESHOLDS_PERCENT
    if own.webhook is not None:
        return Alerts(at_percent, own.webhook, own.format)
    return Alerts(at_percent, common.webhook, common.format)


def passed(standing: Standing, thresholds_percent: Iterable[int]) -> list[Alert]:
    """Return an alert for each threshold of a cap that the spending has reached, the lowest first."""
    if not standing.cap_nano:
        return []
    reached = [percent for percent in sorted(thresholds_percent) if standing.spent_nano * 100 >= standing.cap_nano * percent]
    return [_threshold(standing, percent) for percent in reached]


def _threshold(standing: Standing, percent: int) -> Alert:
    names = {"day": "today", "week": "this week", "month": "this month", "cycle": "this cycle", "ever": "in all"}
    when = names[standing.window.partition(":")[0]]
    cap_nano = standing.cap_nano or 0
    return Alert(
        "threshold",
        standing.scope,
        f"{standing.window} {standing.starts_at} {percent}",
        f"{named_in_full(standing.scope)} spent {cents(standing.spent_nano)} of {cents(cap_nano)} {when} ({percent} % of the cap reached)",
        {
            "window": standing.window,
            "window_start": standing.starts_at,
            "threshold_percent": percent,
            "spent_nano": standing.spent_nano,
            "cap_nano": cap_nano,
            "resets_at": standing.resets_at,
        },
    )


def forecast(coming: Forecast, starts_at: int) -> Alert | None:
    """Return the alert for a cap that would be reached before its window ends; a day's own is left to the thresholds. Once a window."""
    if coming.reached_on is None or coming.window == "day":
        return None
    facts: Facts = {
        "window": coming.window,
        "window_start": starts_at,
        "cap_nano": coming.cap_nano,
        "forecast_nano": coming.at_end_nano,
        "cap_reached_on": coming.reached_on.isoformat(),
    }
    return Alert("forecast", coming.scope, f"{coming.window} {starts_at}", coming.sentence, facts)


def overrun(app: str, model: str, call_id: int, bill: Resolution, now: float, *, in_steps: bool) -> Alert:
    """Return the alert for a call that cost more than was held for it. Once a day for an app and model: later ones say nothing new.

    `in_steps`: it was a stream that was held in steps, by the pace that prices.yaml declares for its model.
    """
    why = f"{model} passed its declared pace" if in_steps else "its quote was too low"
    sentence = (
        f"a call of {app_named(app)} cost {cents(bill.spent_nano)}, more than the {cents(bill.held_nano)} held for it: {why}. "
        f"{model} is reserved whole until: {PROGRAM} overrun clear {model}"
    )
    facts: Facts = {"model": model, "call_id": call_id, "spent_nano": bill.spent_nano, "held_nano": bill.held_nano}
    return Alert("overrun", app_scope(app), f"{model} {int(now) // DAY_S}", sentence, facts)


def late(app: str, model: str, call_id: int, bill: Resolution, stalled_s: float, now: float) -> Alert:
    """Return the alert for a call that passed its grant while the gateway stood still and could not cut it. Once a day for an app."""
    sentence = (
        f"a call of {app_named(app)} is booked at {cents(bill.spent_nano)}, more than the {cents(bill.held_nano)} held for it: the gateway "
        f"stood still for {stalled_s:.1f} s while it ran, and could not cut it. See what else takes this machine's processor or memory"
    )
    facts: Facts = {"model": model, "call_id": call_id, "spent_nano": bill.spent_nano, "held_nano": bill.held_nano}
    return Alert("overrun", app_scope(app), f"late {int(now) // DAY_S}", sentence, facts)


def batch_overrun(app: str, batch_id: str, call_id: int, bill: Resolution, now: float) -> Alert:
    """Return the alert for a batch whose results cost more than was held for it: its quote was wrong."""
    sentence = (
        f"batch {batch_id} of {app_named(app)} cost {cents(bill.spent_nano)}, more than the {cents(bill.held_nano)} held for it: its quote "
        "was too low (a batch that is billed otherwise than prices.yaml says?)"
    )
    facts: Facts = {"batch": batch_id, "call_id": call_id, "spent_nano": bill.spent_nano, "held_nano": bill.held_nano}
    return Alert("overrun", app_scope(app), batch_id, sentence, facts)


def speed(app: str, session: str, spent_nano: int, over_nano: int, now: float) -> Alert:
    """Return the alert for a session that spends fast. Once an hour while it lasts."""
    shown = safe_name(session)
    pasted = argument(shown)
    sentence = (
        f"session {shown} of {app_named(app)} spent {cents(spent_nano)} in the last hour, more than {cents(over_nano)} "
        f"(each.session.per_hour). What it does: {PROGRAM} sessions {pasted}. To stop it: {PROGRAM} pause {app} --session {pasted} --now"
    )
    facts: Facts = {"session": shown, "spent_nano": spent_nano, "per_hour_nano": over_nano}
    return Alert("speed", part_scope(app, ("session", shown)), str(int(now) // HOUR_S), sentence, facts)


def drift(app: str, asked: str, served: str, call_id: int, now: float) -> Alert:
    """Return the alert for another model's answer to an app whose policy demands the one it asks for. Once a day for each pair."""
    sentence = f"{app_named(app)} asked for {asked} and {served} answered (call {call_id}): {PROGRAM} report --by served shows since when"
    facts: Facts = {"asked": asked, "served": served, "call_id": call_id}
    return Alert("drift", app_scope(app), f"{asked} {served} {int(now) // DAY_S}", sentence, facts)


def key_refused(source: Source, now: float) -> Alert:
    """Return the alert for a real key that the provider does not take. Once an hour while it lasts."""
    sentence = f"the Claude API does not take the real key (401): see where gateway.yaml reads it from (key: {source.kind})"
    return Alert("key_refused", TOTAL, str(int(now) // HOUR_S), sentence, {"status": 401})


def redirected(upstream: str, status: int, now: float) -> Alert:
    """Return the alert for an upstream that redirects. Once an hour while it lasts."""
    sentence = (
        f"{upstream} answered a call with a redirect ({status}), which its app did not get: a client that follows one sends its prompt "
        "past the gateway. Name the API's own address in gateway.yaml (upstream)"
    )
    return Alert("redirect", TOTAL, str(int(now) // HOUR_S), sentence, {"status": status})


def keys_unavailable(issuer: str, why: str, age_s: float, now: float) -> Alert:
    """Return the alert for an issuer whose keys cannot be fetched. Once a day while it lasts."""
    then = "its tokens are refused (503)"
    if age_s < DAY_S:
        then = f"its tokens are checked by the keys of {age_s / 60:,.0f} min ago, for a day at most, then refused (503)"
    sentence = f"the keys of the issuer {issuer} cannot be fetched ({why}); {then}"
    return Alert("issuer", TOTAL, f"{issuer} {int(now) // DAY_S}", sentence, {"issuer": issuer})


def retiring(found: Retiring, now: float) -> Alert:
    """Return the alert for a model that an app may use and that the provider is about to retire. Once for each app and model."""
    what = found.what
    facts: Facts = {"model": what.model, "fast": what.fast, "retires": what.day}
    return Alert("retirement", app_scope(found.app), f"{what.what} {what.day}", found.sentence(now), facts)


def refused_as_retired(app: str, model: str, why: str, call_id: int, now: float) -> Alert:
    """Return the alert for a call that the provider refused since its model is no more. Once a day for an app and model."""
    sentence = f"the Claude API refused a call of {app_named(app)} (call {call_id}) for {model}: {why}"
    return Alert("retirement", app_scope(app), f"refused {model} {int(now) // DAY_S}", sentence, {"model": model, "call_id": call_id})


def policy_broken(problem: str, digest: str, now: float) -> Alert:
    """Return the alert for a saved policy that is not in force, with the place alone: `problem` may quote a mistyped secret."""
    place = re.match(r"\S+\.yaml(:\d+)?(?=:)", problem)
    where = place[0] if place else "policies"
    sentence = f"a saved policy is not in force ({where}), and the policy of before stays. What is wrong: {PROGRAM} check"
    return Alert("policy", TOTAL, f"{where} {int(now) // HOUR_S}", sentence, {"place": where, "in_force": digest[:12]})


def payload(alert: Alert, at: float, address: str, form: str | None) -> bytes:
    """Return the body for a webhook: `json`, or `slack`, which takes a text alone. `form` None: as the address's host suggests."""
    text = f"gateway: {alert.sentence}"
    if (form or ("slack" if urlsplit(address).hostname == "hooks.slack.com" else "json")) == "slack":
        for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # Slack's three control characters
            text = text.replace(character, entity)
        return json.dumps({"text": text}).encode()
    when = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    return json.dumps({"text": text, "kind": alert.kind, "scope": alert.scope, "at": when, **alert.facts}).encode()
