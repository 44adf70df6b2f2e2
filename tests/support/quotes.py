"""A policy that allows everything, requests, and their quotes."""

import json
from datetime import UTC, datetime
from functools import cache
from typing import Any

from gateway_addon import pricing
from gateway_addon.calls.quote import Quote, quote
from gateway_addon.messages.request import ParsedRequest, Request, read
from gateway_addon.policy import AppPolicy
from gateway_addon.policy.loading import parse_app

PRICES = pricing.load(None, None)
NOW = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
EVERYTHING = """
models: {allow: ['claude-*']}
caps: unlimited
unknown_fields: pass
features:
  web_search: {max_uses: 5, tokens_per_use: 10k}
  web_fetch: {max_uses: 5}
  code_execution: true
  tool_search: true
  mcp: {tokens_per_use: 1k}
  files: true
  container: true
  compaction: true
  thread: true
  advisor: {max_uses: 3}
  fallbacks: {default: [claude-haiku-4-5]}
  fast: true
  inference_geo: true
"""


@cache
def app(geo: str = "global", text: str = EVERYTHING) -> AppPolicy:
    return parse_app("policies/apps/tester.yaml", text, PRICES, {}, workspace_geo=geo)


def reading(**body: Any) -> ParsedRequest:
    plain = {"model": "claude-haiku-4-5", "max_tokens": 1000, "messages": [{"role": "user", "content": "hello"}]}
    raw = json.dumps(plain | body, separators=(",", ":"), ensure_ascii=False).encode()
    found = read("messages", Request("POST", "/v1/messages", (), raw))
    assert isinstance(found, ParsedRequest), found
    return found


def quoted(found: ParsedRequest, geo: str = "global", text: str = EVERYTHING) -> Quote:
    bound = quote(found, app(geo, text), PRICES, NOW)
    assert isinstance(bound, Quote), bound
    return bound


def content(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}
