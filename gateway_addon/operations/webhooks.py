"""Deliver alerts: to the log, to the ledger and to webhooks, beside the calls and never in their way.

Promises that each alert is delivered once over all processes (the ledger decides by which one), that an undelivered alert is kept in the
ledger and tried again with growing pauses for a day, by any process, after a restart too, and that a webhook's address, a secret,
appears in no log. A webhook gets an alert twice only if a process dies between sending it and noting that.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from gateway_addon.calls import alerts
from gateway_addon.http_client import STRAIGHT, Egress, Unanswered, ask
from gateway_addon.ledger import Alert, DueAlert, Ledger, background
from gateway_addon.ledger.reports.sessions import fast
from gateway_addon.policy import Alerts, GatewayPolicy, Source, all_caps, retiring

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
RETRY_S = 10.0  # and twice that each time, up to 21 minutes
SESSIONS_EVERY_S = 20.0
GIVE_UP_S = 86_400.0
POST_TIMEOUT_S = 4.0
QUEUE_MAX = 1000  # alerts that wait for a ledger that is away; the oldest is dropped first


class AlertDelivery:
    """Deliver the alerts of one process. `secret` reads a webhook's address, or raises; `way` leads to it; `clock` returns unix seconds."""

    def __init__(
        self,
        ledger: Ledger,
        secret: Callable[[Source], str],
        clock: Callable[[], float],
        way: Callable[[str], Egress] = lambda url: STRAIGHT,
        *,
        retry_s: float = RETRY_S,
    ):
        self._ledger, self._secret, self._clock, self._way, self._retry_s = ledger, secret, clock, way, retry_s
        self._news: deque[Alert] = deque(maxlen=QUEUE_MAX)
        self._passed: frozenset[tuple[str, str]] = frozenset()
        """Thresholds whose alerts are known to be in the ledger, by scope and `once`."""
        self._models_looked: tuple[str, int] | None = None
        """The policy and the day for which its models were looked at."""

        self._forecasts_looked: tuple[str, int] | None = None
        """The policy and the hour for which its caps were forecast."""
        self._sessions_looked_at = -math.inf

    def emit(self, alert: Alert) -> None:
        """Queue an alert for the next look. Never waits."""
        self._news.append(alert)

    async def look(self, policy: GatewayPolicy) -> None:
        """Enter new alerts in the ledger: those of this process, and those of what all have spent. Raises LedgerUnavailable."""
        self._look_at_models(policy)
        while self._news:
            await self._once(self._news[0], policy)
            self._news.popleft()
        await self._look_at_caps(policy)
        await self._look_at_forecasts(policy)
        await self._look_at_sessions(policy)

    def _look_at_models(self, policy: GatewayPolicy) -> None:
        now = self._clock()
        look = (policy.digest, int(now) // alerts.DAY_S)
        if look == self._models_looked:
            return
        self._models_looked = look
        for found in retiring(policy, now):
            if not found.what.is_past(now):
                self.emit(alerts.retiring(found, now))

    async def _look_at_caps(self, policy: GatewayPolicy) -> None:
        limits = all_caps(policy)
        standings = await self._ledger.capped(limits, now=self._clock()) if limits else ()
        still: set[tuple[str, str]] = set()
        for standing in standings:
            reached = alerts.passed(standing, alerts.rule(policy, standing.scope).at_percent)
            fresh = [alert for alert in reached if (alert.scope, alert.once) not in self._passed]
            for alert in fresh[:-1]:  # passed in the same moment as a higher one, which says it all
                await self._ledger.alert_once(alert, send=False, now=self._clock())
            for alert in fresh[-1:]:
                await self._once(alert, policy)
            still.update((alert.scope, alert.once) for alert in reached)
        self._passed = frozenset(still)

    async def _look_at_forecasts(self, policy: GatewayPolicy) -> None:
        """Alert of caps that would be reached before their windows end. Once an hour: a forecast moves with the days that are over."""
        now = self._clock()
        look = (policy.digest, int(now) // alerts.HOUR_S)
        if look == self._forecasts_looked:
            return
        standings = await self._ledger.capped(all_caps(policy), now=now)
        for standing, coming in zip(standings, await self._ledger.forecasts(standings, now=now), strict=True):
            if (alert := alerts.forecast(coming, standing.starts_at)) is not None:
                await self._once(alert, policy)
        self._forecasts_looked = look

    async def _look_at_sessions(self, policy: GatewayPolicy) -> None:
        """Alert of sessions that spend fast, where a policy says what that is. In a thread, a few times a minute."""
        now = self._clock()
        limits = [(name, app.each["session"].per_hour_nano) for name, app in policy.apps.items() if "session" in app.each]
        if now - self._sessions_looked_at < SESSIONS_EVERY_S or not any(limit is not None for _, limit in limits):
            return
        self._sessions_looked_at = now
        for app, over_nano in limits:
            if over_nano is None:
                continue
            for session, spent_nano in await background.read(self._ledger.place, partial(fast, app=app, over_nano=over_nano, now=now)):
                await self._once(alerts.speed(app, session, spent_nano, over_nano, now), policy)

    async def _once(self, alert: Alert, policy: GatewayPolicy) -> None:
        wanted = alerts.rule(policy, alert.scope).webhook is not None
        if await self._ledger.alert_once(alert, send=wanted, now=self._clock()):
            logger.warning("Alert: %s.", alert.sentence)

    async def deliver(self, policy: GatewayPolicy) -> None:
        """Send due alerts, one after the other, until none is left. The ledger keeps the undelivered ones. Raises LedgerUnavailable."""
        while due := await self._ledger.take_alert(retry_s=self._retry_s, give_up_s=GIVE_UP_S, now=self._clock()):
            await self._send(due, alerts.rule(policy, due.alert.scope))

    async def _send(self, due: DueAlert, to: Alerts) -> None:
        if to.webhook is None:
            self._ledger.alert_done(due.id, None)
            return
        try:
            address = self._secret(to.webhook)
            await asyncio.to_thread(post, address, alerts.payload(due.alert, due.at, address, to.format), self._way)
        except Exception as error:
            logger.warning("An alert could not be sent (try %d): %s.", due.tries, _what_failed(error))
        else:
            self._ledger.alert_done(due.id, self._clock())


def post(address: str, body: bytes, way: Callable[[str], Egress]) -> None:
    """Send an alert to a webhook, in a thread. Raises Unanswered, and what finding the way raises."""
    headers = {"content-type": "application/json", "user-agent": "gateway-addon"}
    sent = ask(address, "the webhook", timeout_s=POST_TIMEOUT_S, way=way(address), method="POST", headers=headers, body=body, inside=True)
    with sent as answer:
        if not 200 <= answer.status < 300:
            phrase = HTTPStatus(answer.status).phrase if answer.status in list(HTTPStatus) else ""
            raise Unanswered(f"the webhook answered {answer.status} {phrase}".rstrip())


def _what_failed(error: Exception) -> str:
    """Return the kind of failure, for the log, and never its words, which can hold the address."""
    return f"{error}" if isinstance(error, Unanswered) else f"the webhook failed ({type(error).__name__})"
