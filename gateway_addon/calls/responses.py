"""Shape the gateway's own answers and headers: how an app's caps stand, which models it sees, what was edited. Pure; decides nothing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway_addon.calls.spend_limit import allowed_headers
from gateway_addon.ledger import Standing, app_scope
from gateway_addon.ledger.reports.forecast import Forecast
from gateway_addon.money import dollars
from gateway_addon.names import NAME_CHARS_MAX, safe_name
from gateway_addon.policy import AppPolicy, may_use
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


def me(app: AppPolicy, standings: Iterable[Standing], forecasts: Iterable[Forecast]) -> OwnResponse:
    """Answer `GET /gateway/me`: an app's own caps, and each with its forecast, for apps that plan their work."""
    request_cap = app.caps.get("request")
    windows = [_amounts(standing) | _coming(forecast) for standing, forecast in zip(standings, forecasts, strict=True)]
    return OwnResponse({"app": app.name, "models": list(app.models.allow), "request_cap_nano": request_cap, "windows": windows})


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


def cap_headers(app: str, standings: Sequence[Standing]) -> list[tuple[str, str]]:
    """Return how the app's own caps stood at admission: `x-gateway-cap-WINDOW`, with the call's reservation, and what Claude Code reads."""
    own = [standing for standing in standings if standing.scope == app_scope(app) and standing.cap_nano is not None]
    return [*((f"x-gateway-cap-{standing.window}", _header(standing)) for standing in own), *allowed_headers(app, own)]


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
