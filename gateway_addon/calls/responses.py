"""Shape the gateway's own answers and headers: how an app's caps stand, which models it sees, what was edited. Pure; decides nothing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway_addon.calls.spend_limit import allowed_headers
from gateway_addon.ledger import Standing, app_scope, enclosing, part_of
from gateway_addon.ledger.reports.forecast import Forecast
from gateway_addon.money import dollars
from gateway_addon.names import NAME_CHARS_MAX, safe_name
from gateway_addon.policy import AppPolicy, caps_of_part, last_call_share, may_use
from gateway_addon.pricing import Prices


@dataclass(frozen=True, slots=True)
class OwnResponse:
    """An answer that the gateway makes itself. `body` None: an empty one; bytes: a text as it is."""

    body: Mapping[str, Any] | bytes | None
    status: int = 200
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    """Headers beside those of every answer."""
    secret: str | None = field(default=None, repr=False)
    """A secret that is masked in `body`: only the client sees it (exchange.py)."""

    def content(self) -> bytes:
        """Return the body's bytes."""
        if self.body is None:
            return b""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def me(app: AppPolicy, standings: Iterable[Standing], forecasts: Iterable[Forecast], of_parts: Iterable[Standing] = ()) -> OwnResponse:
    """Answer `GET /gateway/me`: an app's own caps, and each with its forecast, for apps that plan their work; and those of its parts."""
    windows = [_amounts(standing) | _coming(forecast) for standing, forecast in zip(standings, forecasts, strict=True)]
    parts = [_part(app, standing) for standing in of_parts]
    about = {"app": app.name, "models": list(app.models.allow), "request_cap_nano": app.caps.get("request")}
    return OwnResponse({**about, "windows": windows, "parts": parts})


def _part(app: AppPolicy, standing: Standing) -> dict[str, Any]:
    kind, value = part_of(standing.scope) or ("", "")
    return {"part": kind, "value": value, "last_call_percent": caps_of_part(app, kind, value).last_call_percent, **_amounts(standing)}


def visible_models(app: AppPolicy, prices: Prices, body: bytes) -> bytes:
    """Return an answer of `GET /v1/models` with only the models that the app may use, in the API's paging shape."""
    page = json.loads(body)
    page["data"] = [model for model in page["data"] if may_use(app, model["id"], prices)]
    if page["data"]:  # else the upstream's cursors stay: the next page may hold something
        page["first_id"], page["last_id"] = page["data"][0]["id"], page["data"][-1]["id"]
    return json.dumps(page).encode()


def note_header(note: str | None) -> list[tuple[str, str]]:
    """Return the header of a note to the provider's own refusal, whose body passes unchanged."""
    return [("x-gateway-note", note)] if note else []


def cap_headers(app: AppPolicy, standings: Sequence[Standing]) -> list[tuple[str, str]]:
    """Return how the caps of an app and of its parts stood at admission, with the call's reservation, and what Claude Code reads."""
    return [*standing_headers(app, standings), *allowed_headers(app.name, standings)]


def standing_headers(app: AppPolicy, standings: Sequence[Standing]) -> list[tuple[str, str]]:
    """Return how the caps of an app and of its parts stand.

    `x-gateway-cap-WINDOW` is the app's, `x-gateway-cap-KIND` a part's, with an item for each window.
    """
    fields: dict[str, list[str]] = {}
    scope = app_scope(app.name)
    for standing in standings:
        if enclosing(standing.scope) != scope or standing.cap_nano is None:
            continue
        if (part := part_of(standing.scope)) is None:
            fields[standing.window.partition(":")[0]] = [_header(standing)]
            continue
        kept_nano = kept_for_last_calls(app, standing)
        kept = f"; last_call={dollars(kept_nano)}" if kept_nano else ""
        fields.setdefault(part[0].replace(".", "-"), []).append(f"{_header(standing)}; window={standing.window}{kept}")
    return [(f"x-gateway-cap-{name}", ", ".join(values)) for name, values in fields.items()]


def kept_for_last_calls(app: AppPolicy, standing: Standing) -> int:
    """Return the share of a part's cap that is kept for last calls and that the standing, of a call which is none, leaves out."""
    found = caps_of_part(app, *(part_of(standing.scope) or ("", "")))
    whole_nano = found.caps.get(standing.window, 0)
    most_nano = whole_nano + standing.raised_nano
    in_force_nano = most_nano if standing.limit_nano is None else min(most_nano, standing.limit_nano)
    left_out_nano = in_force_nano - (standing.cap_nano or 0)
    return left_out_nano if 0 < left_out_nano <= last_call_share(whole_nano, found) else 0  # more: the cap is a token's own


def edited_text(changes: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return what the policy changed in a body as the value of `x-gateway-edited`: `max_tokens=32000 (asked 64000)`; "" for nothing."""
    return ", ".join(f"{name}={_ascii(value)} (asked {_ascii(asked.get(name))})" for name, value in changes.items())


def edited_header(text: str) -> list[tuple[str, str]]:
    """Return the header of an answer whose call the policy edited; none where it did not."""
    return [("x-gateway-edited", text)] if text else []


def _ascii(value: Any) -> str:
    """Return a value as a header can hold it, even where a client sent something else than a name or a number."""
    shown = safe_name(value) if isinstance(value, str) else json.dumps(value)[:NAME_CHARS_MAX]
    return shown.encode("ascii", "backslashreplace").decode()


def error_event(error_type: str, sentence: str) -> bytes:
    """Return the last event of a stream that the gateway ends: an `error` may come at any point (platform documentation, "Streaming")."""
    error = {"type": "error", "error": {"type": error_type, "message": sentence}}
    return f"event: error\ndata: {json.dumps(error)}\n\n".encode()


def _amounts(standing: Standing) -> dict[str, Any]:
    """Return a cap's amounts for programs, each in nano-dollars and as dollars."""
    free_nano = None if standing.cap_nano is None else max(0, standing.cap_nano - standing.spent_nano - standing.reserved_nano)
    amounts = {
        "cap": standing.cap_nano,
        "raised": standing.raised_nano,
        "limit": standing.limit_nano,
        "spent": standing.spent_nano,
        "held": standing.reserved_nano,
        "free": free_nano,
    }
    return {
        "window": standing.window,
        "resets_at": standing.resets_at,
        **{f"{name}_nano": nano for name, nano in amounts.items()},
        **{name: None if nano is None else dollars(nano) for name, nano in amounts.items()},
    }


def _coming(forecast: Forecast) -> dict[str, Any]:
    nano = forecast.at_end_nano
    reached_on = None if forecast.reached_on is None else forecast.reached_on.isoformat()
    return {
        "forecast_nano": nano,
        "forecast": None if nano is None else dollars(nano),
        "forecast_days": forecast.closed_days,
        "cap_reached_on": reached_on,
    }


def _header(standing: Standing) -> str:
    reset = "" if standing.resets_at is None else f"; resets={standing.resets_at}"
    return f"spent={dollars(standing.spent_nano)}; held={dollars(standing.reserved_nano)}; cap={dollars(standing.cap_nano or 0)}{reset}"
