"""Who hears of a cap before it is reached: once per scope, window and threshold, over all processes.

Promises that an alert never delays a call and never carries a secret, and that a delivery is tried four times; whatever came of
it, the alert stands in the log and in `gateway report --alerts`. An edge: it speaks to a webhook.
"""

import asyncio
import json
import logging
import urllib.request
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

from gateway_addon.ledger import Ledger, LedgerUnavailable, Standing
from gateway_addon.money import cents
from gateway_addon.policy import Alerts, AppPolicy, GatewayPolicy, Source

logger = logging.getLogger(__name__)

THRESHOLDS_PERCENT = (50, 80, 95, 100)  # where the policy does not say
RETRY_AFTER_S = (1.0, 5.0, 30.0)
POST_TIMEOUT_S = 10.0


def due(standing: Standing, thresholds_percent: Iterable[int]) -> list[int]:
    """The thresholds of a cap that what is spent has reached."""
    if not standing.cap_nano:
        return []
    return [percent for percent in sorted(thresholds_percent) if standing.spent_nano * 100 >= standing.cap_nano * percent]


def sentence(standing: Standing, percent: int) -> str:
    """An alert for a person."""
    kind, _, name = standing.scope.partition(":")
    who = f"{kind} {name}" if name else "all apps together"
    when = {"day": "today", "week": "this week", "month": "this month", "ever": "in all"}[standing.window]
    return f"{who} spent {cents(standing.spent_nano)} of {cents(standing.cap_nano or 0)} {when} ({percent} % of the cap reached)"


def payload(address: str, text: str, facts: dict[str, object]) -> bytes:
    """What a webhook gets: plain JSON, or Slack's own form, which takes a text alone."""
    slack = (urlsplit(address).hostname or "").endswith("slack.com")
    return json.dumps({"text": f"gateway: {text}"} if slack else {"text": f"gateway: {text}", **facts}).encode()


class Alerter:
    """One process's alerts. `secret` resolves a webhook's address; where it raises, only that delivery is lost."""

    def __init__(self, ledger: Ledger, secret: Callable[[Source], str], clock: Callable[[], float]):
        self._ledger, self._secret, self._clock = ledger, secret, clock
        self._told: set[tuple[str, str, int, int]] = set()
        self._tasks: set[asyncio.Task[object]] = set()

    def look(self, standings: Iterable[Standing], policy: GatewayPolicy, app: AppPolicy) -> None:
        """Look at the caps over an app that has spent something."""
        for standing in standings:
            rule = app.alerts if standing.scope.startswith("app:") else policy.alerts
            for percent in due(standing, rule.at_percent or THRESHOLDS_PERCENT):
                known = (standing.scope, standing.window, standing.starts_at, percent)
                if known not in self._told:
                    self._told.add(known)
                    self._start(self._once(standing, percent, rule))

    def notice(self, text: str, rule: Alerts) -> None:
        """Say something that is worth a person's attention each time: a bill above its grant, another model than asked."""
        logger.warning("%s", text)
        if rule.webhook is not None:
            self._start(self._post(rule.webhook, text, {"at": self._clock()}))

    async def stop(self) -> None:
        """Let deliveries go; what the ledger does not know as delivered is in `gateway report --alerts` all the same."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _once(self, standing: Standing, percent: int, rule: Alerts) -> None:
        try:
            if not await self._ledger.alert_once(standing, percent, now=self._clock()):
                return
        except LedgerUnavailable as error:
            logger.warning("An alert waits for the ledger: %s", error)
            self._told.discard((standing.scope, standing.window, standing.starts_at, percent))
            return
        text = sentence(standing, percent)
        logger.warning("Alert: %s", text)
        if rule.webhook is None:
            return
        facts = {
            "scope": standing.scope,
            "window": standing.window,
            "threshold_percent": percent,
            "spent_nano": standing.spent_nano,
            "cap_nano": standing.cap_nano,
            "resets_at": standing.resets_at,
        }
        if await self._post(rule.webhook, text, facts):
            self._ledger.alert_delivered(standing, percent, now=self._clock())

    async def _post(self, webhook: Source, text: str, facts: dict[str, object]) -> bool:
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                address = self._secret(webhook)
                await asyncio.to_thread(_send, address, payload(address, text, facts))
                return True
            except Exception as error:  # the address is a secret, so only the kind of failure is said
                logger.warning("The alerts' webhook failed (%s)%s.", type(error).__name__, "" if wait_s else "; it is not tried again")
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        return False


def _send(address: str, body: bytes) -> None:
    request = urllib.request.Request(address, body, {"content-type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=POST_TIMEOUT_S):
        pass
