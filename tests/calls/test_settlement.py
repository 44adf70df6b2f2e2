"""Settlement's table, row by row, on values alone; test_endings.py shows the same rows through a proxy."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from ledgers import CALL
from quotes import NOW, PRICES, app, quoted, reading
from upstreams import event, message

from gateway_addon.calls.admission import Admission, Caller, Hold
from gateway_addon.calls.progress import Pace
from gateway_addon.calls.reservation_options import ReservationOption
from gateway_addon.calls.running import InFlightCall
from gateway_addon.calls.settlement import settle
from gateway_addon.cli.meter import meter
from gateway_addon.ledger import Outcome, Reserved, Settlement

GRANTED = 1000
ENVELOPE = b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}'
OPENING = {"id": "msg_1", "model": "claude-haiku-4-5", "usage": {"input_tokens": 9, "output_tokens": 1}}
START = event("message_start", message=OPENING)
DEARER = event("message_start", message=OPENING | {"model": "claude-opus-4-5"})
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


def in_flight(asked, granted, pace=None):
    """An admitted call of which so many tokens of output are held."""
    policy = SimpleNamespace(prices=PRICES)
    caller = Caller(app(), None, "messages", policy, frozenset(), NOW)
    hold = Hold(Reserved(1, (), "reports", (), "me"), quoted(asked), ReservationOption(granted, 0, pace))
    return InFlightCall(Admission(caller, CALL, asked, NOW, hold=hold), hold, 0.0)


def unreleasable(hold):
    return hold._replace(quote=replace(hold.quote, releasable=False))


def call(status=None, body=b"", content_type="application/json", model="claude-haiku-4-5", *, after_s=2.0, granted=GRANTED, **more):
    """A call whose answer had arrived as far as `body` by `after_s`."""
    asked = reading(model=model, max_tokens=granted, **more)
    running = in_flight(asked, granted)
    if status is not None:
        running.answered(status, content_type, None, "req_1", now=NOW + 1, monotonic_s=1.0)
        running.feed(body, after_s)
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
        (call(504, b"<html>"), "whole", ALL, "estimated:error_unreadable"),
        (call(524, b"<html>"), "whole", ALL, "estimated:error_unreadable"),
        (call(400, b"<html>"), "whole", ALL, "estimated:error_unreadable"),
        (call(500, ENVELOPE[:-9]), "upstream", ALL, "estimated:error_unreadable"),
        (call(500, message()), "whole", BOUND, "estimated:error_unreadable"),
        (call(200, b"junk"), "whole", ALL, "estimated:usage_unreadable"),
        (call(200, b""), "client", ALL, "estimated:usage_unreadable"),
        (call(200, message("claude-unheard-of-9")), "whole", ALL, "estimated:model_unpriced"),
        (streamed(event("ping")), "upstream", ALL, "estimated:usage_unreadable"),
        (streamed(START), "upstream", BOUND, "estimated:cut"),
        (streamed(START), "client", BOUND, "estimated:cut"),
        (streamed(DEARER), "client", ALL, "estimated:cut"),
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


PACE = Pace(tokens_per_second_max=10, lag_s=1.0, turn_s_min=2.0)


def left(body=None, *, at_s=3.0, stalled_s=0.0, granted=GRANTED, **more):
    """A stream that ended `at_s` after it was let go, held whole unless less is `granted`."""
    asked = reading(max_tokens=GRANTED, stream=True, **more)
    running = in_flight(asked, granted, PACE)
    if body is not None:
        running.answered(200, "text/event-stream", None, "req_1", now=NOW + 1, monotonic_s=1.0)
        running.feed(body, 2.0)
    running.ended(at_s, stalled_s)
    return running


UNPRICED = event("message_start", message=OPENING | {"model": "claude-unheard-of-9"})
BY_THEN = 40  # tokens of three seconds and a lag
UNTOUCHED = left().hold.quote


@pytest.mark.parametrize(
    ("running", "ended_by", "cost_nano", "flags"),
    [
        (left(), "client", UNTOUCHED.for_output(BY_THEN), "estimated:no_status"),
        (left(), "upstream", ALL, "estimated:no_status"),
        (left(event("ping")), "client", UNTOUCHED.for_output(BY_THEN), "estimated:cut"),
        (left(event("ping")), "upstream", ALL, "estimated:usage_unreadable"),
        (left(START), "client", 9 * 1_000 + (1 + BY_THEN) * 5_000, "estimated:cut estimated"),
        (left(START), "upstream", 9 * 1_000 + (1 + BY_THEN) * 5_000, "estimated:cut estimated"),
        (left(START), "gateway", BOUND, "estimated:gateway_error estimated"),
        (left(START + ERROR), "whole", 9 * 1_000 + (1 + BY_THEN) * 5_000, "estimated:stream_error estimated"),
        (left(START, at_s=9e9), "client", BOUND, "estimated:cut estimated"),
        (left(at_s=9e9), "client", ALL, "estimated:no_status"),
        (left(UNPRICED), "client", ALL, "drift estimated:cut"),
        (left(START, granted=20), "client", 9 * 1_000 + 20 * 5_000, "estimated:cut estimated"),
        (left(START, granted=20, stalled_s=0.5), "client", 9 * 1_000 + 25 * 5_000, "estimated:cut estimated"),
        (left(granted=20, stalled_s=0.5), "client", UNTOUCHED.for_output(25), "estimated:no_status late"),
        (left(granted=20, stalled_s=99), "client", UNTOUCHED.for_output(BY_THEN), "estimated:no_status late"),
    ],
)  # fmt: skip
def test_a_stream_that_is_left_is_settled_by_then(running, ended_by, cost_nano, flags):
    found = settle(running, sent=True, ended_by=ended_by)
    assert isinstance(found, Settlement)
    assert (found.cost_nano, " ".join(found.outcome.flags)) == (cost_nano, flags)


@pytest.mark.parametrize("body", [None, START])
@pytest.mark.parametrize("ended_by", ["client", "upstream"])
def test_a_loop_that_is_left_keeps_what_is_held(body, ended_by):
    found = settle(left(body, **SEARCH), sent=True, ended_by=ended_by)
    assert isinstance(found, Settlement)
    assert found.cost_nano is ALL


@pytest.mark.parametrize(("body", "released"), [(START, True), (UNTOLD, False), (ZEROES, False), (WHOLE_START, False), (DEARER, False)])
def test_input_is_released_once_the_prompt_is_told(body, released):
    """A release on zeroes would leave nothing for the input that the last event brings; a dearer model's answer leaves none over."""
    running = streamed(body)
    held_nano = running.held_nano
    assert ((back_nano := running.release_nano()) > 0) is released
    assert running.held_nano == held_nano - back_nano
    assert back_nano >= 0


def test_a_whole_start_of_a_looping_request_is_exact():
    """Programmatic tool calls run code, so nothing of such a request is released before its end; this is its end."""
    running = streamed(WHOLE_START)
    running.hold = unreleasable(running.hold)
    found = settle(running, sent=True, ended_by="whole")
    assert isinstance(found, Settlement)
    assert (found.cost_nano, found.outcome.complete) == (EXACT, True)


@pytest.mark.parametrize("running", [call(), call(200, message()), call(500, ENVELOPE)])
def test_what_was_never_sent_costs_nothing(running):
    found = settle(running, sent=False, ended_by="gateway")
    assert isinstance(found, Outcome)
    assert found.flags == ("not_sent",)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500, 502, 504, 529])
def test_the_apis_own_refusal_gives_everything_back(status):
    found = settle(call(status, ENVELOPE, after_s=99), sent=True, ended_by="whole")
    assert isinstance(found, Outcome)
    assert (found.status, found.flags) == (status, ("upstream:overloaded_error",))


def metered(status, body, content_type):
    """What `gateway meter` says of the same bytes, in nano-dollars."""
    row = {"content_type": content_type, "status": status, "body": body.decode(), "request": {"max_tokens": GRANTED}}
    said = CliRunner().invoke(meter, ["--jsonl"], input=json.dumps(row))
    return json.loads(said.stdout)["cost_nano"]


SEARCH = {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]}
STREAM = "text/event-stream"
FIRST = [
    (ERROR, STREAM),
    (event("ping") + ERROR, STREAM),
    (event("ping") * 3 + ERROR, STREAM),
    (ENVELOPE, "application/json"),
    (ENVELOPE, STREAM),
    (ERROR, "application/json"),
]


@pytest.mark.parametrize(("body", "content_type"), FIRST, ids=["bare", "ping", "pings", "json", "json as a stream", "stream as json"])
def test_an_answer_that_is_an_error_first_is_void(body, content_type):
    """However late; unless the provider may have worked before, which no request without its own tools lets it."""
    assert metered(200, body, content_type) == 0
    for more, after_s, void in (({}, 0.5, True), ({}, 99, True), (SEARCH, 0.5, True), (SEARCH, 99, False)):
        found = settle(call(200, body, content_type, after_s=after_s, **more), sent=True, ended_by="whole")
        assert isinstance(found, Outcome) is void, (more, after_s)
        if not void:
            assert (found.cost_nano, found.outcome.flags) == (ALL, ("estimated:late_error",))
        else:
            assert found.flags == ("upstream:overloaded_error",)


JSON = "application/json"
SAME_BYTES = [
    (200, START + ENDING, STREAM), (200, WHOLE_START, STREAM), (200, UNBILLED_START, STREAM), (200, UNTOLD + LATE, STREAM),
    (200, ZEROES + LATE, STREAM), (200, START + FALLING, STREAM), (200, START, STREAM), (200, START + ERROR, STREAM),
    (200, UNTOLD, STREAM), (200, ZEROES, STREAM), (200, event("ping"), STREAM), (200, message(), JSON), (200, REFUSED, JSON),
    (200, b"junk", JSON), (200, message("claude-unheard-of-9"), JSON), (500, message(), JSON), (429, message(), JSON),
    (500, ENVELOPE, JSON), (500, ENVELOPE[:-9], JSON), (504, b"<html>", "text/html"), (403, b"<html>", "text/html"),
    *((200, *first) for first in FIRST),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "content_type"), SAME_BYTES)
def test_the_meter_and_settlement_agree_on_the_same_bytes(status, body, content_type):
    """Where only all that is held bounds a call, the meter, which knows of no hold, says that it cannot tell."""
    found = settle(call(status, body, content_type), sent=True, ended_by="whole")
    assert metered(status, body, content_type) == (0 if isinstance(found, Outcome) else found.cost_nano)


@pytest.mark.parametrize("body", [b"", b"<html>blocked</html>", b'{"detail":"blocked"}'])
@pytest.mark.parametrize("status", [403, 413, 429, 521, 523, 525, 526, 530])
def test_a_status_that_only_an_edge_makes_is_void(status, body):
    found = settle(call(status, body, "text/html", after_s=99), sent=True, ended_by="whole")
    assert isinstance(found, Outcome)
    assert found.flags == (f"edge:{status}",)
    assert metered(status, body, "text/html") == 0


@pytest.mark.parametrize("status", [502, 503, 520, 522])
def test_an_edge_that_broke_is_void_soon_and_bounded_later(status):
    """Later it may be that the origin broke off after it took the request, so what can have been generated by then is booked."""
    page, most = b"<html>", 64_000
    quote, pace = call(granted=most).hold.quote, call().declared()
    soon = settle(call(status, page, "text/html", after_s=2.0, granted=most), sent=True, ended_by="whole")
    assert isinstance(soon, Outcome)
    assert soon.flags == ("assumed_unbilled",)
    later = settle(call(status, page, "text/html", after_s=2.1, granted=most), sent=True, ended_by="whole")
    assert isinstance(later, Settlement)
    assert later.cost_nano == quote.for_output(pace.tokens_in(2.1 + pace.lag_s)) < quote.total_nano
    assert later.outcome.flags == ("estimated:edge",)
    much_later = settle(call(status, page, "text/html", after_s=600, granted=most), sent=True, ended_by="whole")
    assert isinstance(much_later, Settlement)
    assert much_later.cost_nano == quote.total_nano, "never more than the grant"
    assert metered(status, page, "text/html") is None


@pytest.mark.parametrize(("reserve", "more"), [("full", {}), ("auto", SEARCH)], ids=["reserve full", "may loop"])
def test_late_edge_break_keeps_the_grant_where_no_rate_bounds(reserve, more):
    """An edge that broke late keeps the grant where no rate bounds it."""
    running = call(502, b"<html>", "text/html", after_s=2.1, **more)
    caller = replace(running.admission.caller, app=replace(running.admission.app, reserve=reserve))
    running.admission = replace(running.admission, caller=caller)
    found = settle(running, sent=True, ended_by="whole")
    assert isinstance(found, Settlement)
    assert (found.cost_nano, found.outcome.flags) == (ALL, ("estimated:edge",))


@pytest.mark.parametrize("status", [429, 502])
def test_an_answer_behind_an_edges_status_is_not_void(status):
    found = settle(call(status, message(), after_s=0.1), sent=True, ended_by="whole")
    assert isinstance(found, Settlement)
    assert "estimated:error_unreadable" in found.outcome.flags


def test_a_cut_of_the_gateways_own_names_its_reason():
    running = streamed(START)
    running.cut = "cap"
    found = settle(running, sent=True, ended_by="gateway")
    assert isinstance(found, Settlement)
    assert set(found.outcome.flags) >= {"cut:cap", "estimated:cut"}
    assert found.cost_nano == BOUND


def test_cut_answer_whose_input_may_grow_keeps_the_grant():
    """A cut answer whose input may still grow keeps the whole grant."""
    running = streamed(START)
    running.hold = unreleasable(running.hold)
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
