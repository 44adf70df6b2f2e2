"""Settlement's table, row by row, on values alone; test_endings.py shows the same rows through a proxy."""

import json
from dataclasses import replace

import pytest
from ledgers import CALL
from quotes import NOW, PRICES, app, quoted, reading
from upstreams import event, message

from gateway_addon.ledger import Settlement
from gateway_addon.running import Running, Ticket
from gateway_addon.settlement import Void, settle

GRANTED = 1000
ENVELOPE = b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}'
OPENING = {"id": "msg_1", "model": "claude-haiku-4-5", "usage": {"input_tokens": 9, "output_tokens": 1}}
START = event("message_start", message=OPENING)
ENDING = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 7}) + event("message_stop")
ERROR = event("error", error={"type": "overloaded_error", "message": "x"})
DECLINED = {"type": "message", "content": [], "stop_reason": "refusal", "usage": {"input_tokens": 9, "output_tokens": 0}}
UNTOLD = event("message_start", message=OPENING | {"usage": None})
ZEROES = event("message_start", message=OPENING | {"usage": {"input_tokens": 0, "output_tokens": 0}})
LATE = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"input_tokens": 9, "output_tokens": 7}) + event("message_stop")
FALLING = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"input_tokens": 0, "output_tokens": 7}) + event("message_stop")
CALLS = {"content": [{"type": "tool_use", "id": "toolu_1", "name": "roll", "input": {}}], "stop_reason": "tool_use"}
WHOLE_START = event("message_start", message=OPENING | CALLS | {"usage": {"input_tokens": 9, "output_tokens": 7}}) + event("message_stop")
UNBILLED_START = event("message_start", message=OPENING | CALLS | {"usage": {"input_tokens": 0, "output_tokens": 0}}) + event("message_stop")
REFUSED = json.dumps(OPENING | DECLINED).encode()
EXACT = 9 * 1_000 + 7 * 5_000  # nine tokens in and seven out, at Haiku 4.5's prices
BOUND = 9 * 1_000 + GRANTED * 5_000
ALL = None  # the whole grant


def call(status=None, body=b"", content_type="application/json", model="claude-haiku-4-5"):
    asked = reading(model=model, max_tokens=GRANTED)
    ticket = Ticket(1, CALL, app(), PRICES, asked, quoted(asked), GRANTED, None, NOW)
    running = Running(ticket)
    if status is not None:
        running.answered(status, content_type, None, "req_1", NOW + 1)
        running.feed(body, NOW + 2)
    return running


def streamed(body):
    return call(200, body, "text/event-stream")


@pytest.mark.parametrize(
    ("running", "ended_by", "cost_nano", "flag"),
    [
        (call(), "upstream", ALL, "estimated:no_status"),
        (call(), "client", ALL, "estimated:no_status"),
        (call(), "gateway", ALL, "estimated:no_status"),
        (call(500, b""), "whole", ALL, "estimated:error_unreadable"),
        (call(502, b"<html>"), "whole", ALL, "estimated:error_unreadable"),
        (call(500, ENVELOPE[:-9]), "upstream", ALL, "estimated:error_unreadable"),
        (call(500, message()), "whole", BOUND, "estimated:error_unreadable"),
        (call(200, b"junk"), "whole", ALL, "estimated:usage_unreadable"),
        (call(200, b""), "client", ALL, "estimated:usage_unreadable"),
        (call(200, message("claude-unheard-of-9")), "whole", ALL, "estimated:model_unpriced"),
        (streamed(event("ping")), "upstream", ALL, "estimated:usage_unreadable"),
        (streamed(START), "upstream", BOUND, "estimated:cut"),
        (streamed(START), "client", BOUND, "estimated:cut"),
        (streamed(START), "gateway", BOUND, "estimated:gateway_error"),
        (streamed(START + ERROR), "whole", BOUND, "estimated:stream_error"),
        (streamed(START + ENDING), "whole", EXACT, None),
        (streamed(START + ENDING), "client", EXACT, None),
        (call(200, REFUSED), "whole", 0, None),
        (streamed(WHOLE_START), "whole", EXACT, None),
        (streamed(UNBILLED_START), "whole", 0, None),
        (streamed(UNTOLD + LATE), "whole", EXACT, None),
        (streamed(ZEROES + LATE), "whole", EXACT, None),
        (streamed(START + FALLING), "whole", EXACT, None),
        (streamed(UNTOLD), "client", ALL, "estimated:usage_unreadable"),
        (streamed(ZEROES), "client", ALL, "estimated:cut"),
    ],
)  # fmt: skip
def test_an_ending_is_settled_by_its_row(running, ended_by, cost_nano, flag):
    found = settle(running, sent=True, ended_by=ended_by)
    assert isinstance(found, Settlement)
    assert found.cost_nano == cost_nano
    assert [each for each in found.outcome.flags if each.startswith("estimated:")] == ([flag] if flag else [])
    assert found.outcome.complete is (flag is None)
    assert sum(part.nano for part in found.parts) == (cost_nano or 0)


@pytest.mark.parametrize(("body", "released"), [(START, True), (UNTOLD, False), (ZEROES, False), (WHOLE_START, False)])
def test_input_is_released_once_the_prompt_is_told(body, released):
    """A release on zeroes would leave nothing for the input that the last event brings."""
    assert (streamed(body).release_nano() > 0) is released


def test_a_whole_start_of_a_looping_request_is_exact():
    """Programmatic tool calls run code, so nothing of such a request is released before its end; this is its end."""
    running = streamed(WHOLE_START)
    running.ticket = replace(running.ticket, quote=replace(running.ticket.quote, releasable=False))
    found = settle(running, sent=True, ended_by="whole")
    assert isinstance(found, Settlement)
    assert (found.cost_nano, found.outcome.complete) == (EXACT, True)


@pytest.mark.parametrize("running", [call(), call(200, message()), call(500, ENVELOPE)])
def test_what_was_never_sent_costs_nothing(running):
    found = settle(running, sent=False, ended_by="gateway")
    assert isinstance(found, Void)
    assert found.outcome.flags == ("not_sent",)


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 529])
def test_the_apis_own_refusal_gives_everything_back(status):
    found = settle(call(status, ENVELOPE), sent=True, ended_by="whole")
    assert isinstance(found, Void)
    assert (found.outcome.status, found.outcome.flags) == (status, ("upstream:overloaded_error",))


def test_a_cut_of_the_gateways_own_names_its_reason():
    running = streamed(START)
    running.cut = "cap"
    found = settle(running, sent=True, ended_by="gateway")
    assert isinstance(found, Settlement)
    assert set(found.outcome.flags) >= {"cut:cap", "estimated:cut"}
    assert found.cost_nano == BOUND


def test_a_cut_answer_whose_input_may_still_grow_keeps_the_whole_grant():
    running = streamed(START)
    running.ticket = replace(running.ticket, quote=replace(running.ticket.quote, releasable=False))
    found = settle(running, sent=True, ended_by="upstream")
    assert isinstance(found, Settlement)
    assert (found.cost_nano, found.outcome.flags) == (ALL, ("estimated:cut",))


@pytest.mark.parametrize(
    ("asked", "served", "drift"),
    [
        ("claude-haiku-4-5", "claude-haiku-4-5", False),
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001", False),
        ("claude-haiku-4-5", "claude-sonnet-5", True),
        ("claude-haiku-4-5", "claude-unheard-of-9", True),
    ],
)
def test_an_answer_by_another_model_is_flagged(asked, served, drift):
    found = settle(call(200, message(served), model=asked), sent=True, ended_by="whole")
    assert ("drift" in found.outcome.flags) is drift
    assert found.outcome.model_served == served
