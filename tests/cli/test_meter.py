"""`gateway meter` as people and programs call it, and what the meter costs in time."""

import base64
import gzip
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway_addon.cli.meter import meter
from gateway_addon.messages import Meter

ANSWER = {
    "type": "message", "id": "msg_1", "model": "claude-opus-5-5", "stop_reason": "end_turn",
    "content": [{"type": "text", "text": "Hello"}],
    "usage": {
        "input_tokens": 1000, "output_tokens": 100, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 60,
        "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 0},
        "service_tier": "standard", "inference_geo": "global", "speed": "standard", "server_tool_use": {"web_search_requests": 1},
    },
}  # fmt: skip
START = b'event: message_start\ndata: {"type":"message_start","message":{"model":"claude-opus-5-5","usage":{"input_tokens":1000,"output_tokens":1}}}\n\n'


def run(given: str | bytes, *arguments: str) -> Result:
    return CliRunner().invoke(meter, list(arguments), input=given)


def rows(*given: dict[str, Any]) -> list[dict[str, Any]]:
    result = run("".join(json.dumps(row) + "\n" for row in given), "--jsonl")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def row(body: str = json.dumps(ANSWER), **more: Any) -> dict[str, Any]:
    return {"content_type": "application/json", "body": body, **more}


def test_the_shape_of_a_row_stays_put() -> None:
    (answer,) = rows(row())
    promised = {
        "model": "claude-opus-5-5",
        "usage": {
            "input_tokens": 1000, "output_tokens": 100, "cache_read_tokens": 10, "cache_write_5m_tokens": 20, "cache_write_1h_tokens": 0,
            "cache_write_unsplit_tokens": 40, "web_search_requests": 1, "web_fetch_requests": 0, "code_execution_requests": 0,
        },
        "iterations": [], "stop_reason": "end_turn", "service_tier": "standard", "speed": "standard", "inference_geo": "global",
        "price_rows": ["claude-opus-5-5@2026-09-22"], "error_type": None, "complete": True, "notes": [],
        "cost_nano": 16_302_000,  # 4.0M + 2.0M + 10 x 200 + 60 x 5,000 + 10.0M for the search
    }  # fmt: skip
    assert {key: answer[key] for key in promised} == promised


def test_each_row_gets_its_answer_in_order() -> None:
    cheap = json.dumps(ANSWER | {"model": "claude-haiku-4-5-20251001"})
    answers = rows(row(), row(cheap), row("junk"), row())
    assert [answer["model"] for answer in answers] == ["claude-opus-5-5", "claude-haiku-4-5-20251001", None, "claude-opus-5-5"]
    assert answers[2]["cost_nano"] is None


@pytest.mark.parametrize(
    "request_body",
    [
        {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"tools": [{"name": "t", "cache_control": {"ttl": "1h"}}]},
    ],
)
def test_hour_ttl_in_the_request_prices_unsplit_writes(request_body: dict[str, Any]) -> None:
    """An hour's ttl in the request prices writes of unknown lifetime."""
    for_minutes, for_hours = rows(row(request={"messages": [{"content": 'a text with "ttl": "1h"'}]}), row(request=request_body))
    assert for_hours["cost_nano"] - for_minutes["cost_nano"] == 40 * 3_000


def test_a_row_is_priced_at_its_day() -> None:
    body = json.dumps({**ANSWER, "model": "claude-sonnet-5-5", "usage": {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 10}})
    before, after = rows(row(body, at="2026-10-06"), row(body, at="2026-10-07"))
    assert (before["cost_nano"], after["cost_nano"]) == (2_000, 1_000)
    assert after["price_rows"] == ["claude-sonnet-5-5@2026-10-07"]


def test_a_compressed_body_in_base64_is_decoded() -> None:
    body = base64.b64encode(gzip.compress(json.dumps(ANSWER).encode())).decode()
    for encoding in ("gzip", None):
        (answer,) = rows(row(body, body_encoding="base64", content_encoding=encoding))
        assert answer["cost_nano"] == 16_302_000


def test_cut_stream_costs_at_most_its_requests_bound() -> None:
    """A cut stream costs at most what its request allowed, and is unknown without one."""
    cut = {"content_type": "text/event-stream", "body": START.decode()}
    bounded, unknown = rows(cut | {"request": {"max_tokens": 500}}, cut)
    assert bounded["cost_nano"] == 14_000_000  # 1,000 x 4,000 + 500 x 20,000
    assert bounded["complete"] is False
    assert bounded["flags"] == ["estimated"]
    assert unknown["cost_nano"] is None
    assert unknown["flags"] == ["incomplete"]


def test_iterations_show_their_models_and_an_error_its_type() -> None:
    """Iterations are printed with their models and an error with its type."""
    usage = ANSWER["usage"] | {"iterations": [{"type": "advisor_message", "model": "claude-opus-5", "input_tokens": 3, "output_tokens": 4}]}
    advised, failed = rows(row(json.dumps(ANSWER | {"usage": usage})), row('{"type":"error","error":{"type":"not_found_error"}}', status=404))
    assert [(part["type"], part["model"], part["input_tokens"]) for part in advised["iterations"]] == [("advisor_message", "claude-opus-5", 3)]
    assert failed["error_type"] == "not_found_error"
    assert failed["cost_nano"] == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{}\n", "line 1 is not a row"),
        ("\n\nnot json\n", "line 3 is not a row"),
        ('{"body": 5}\n', "line 1 is not a row"),
        (json.dumps(row(at="tomorrow")), "'tomorrow' is not a day; write YYYY-MM-DD"),
        (json.dumps(row("###", body_encoding="base64")), "line 1: its body is not base64"),
    ],
)
def test_a_row_that_is_none_ends_with_a_sentence_and_exit_2(given: str, sentence: str) -> None:
    result = run(given, "--jsonl")
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_body_from_stdin_or_a_file_is_printed_readably(tmp_path: Path) -> None:
    """A single body comes from stdin or a file and is printed readably."""
    recording = tmp_path / "answer.json"
    recording.write_text(json.dumps(ANSWER))
    for result in (run(json.dumps(ANSWER)), run("", str(recording)), run(START + b"", "--content-type", "text/event-stream")):
        assert result.exit_code == 0
        assert '\n  "model": "claude-opus-5-5"' in result.stdout
    assert json.loads(run("", str(recording)).stdout)["cost_nano"] == 16_302_000


def test_an_operators_own_prices_count(tmp_path: Path) -> None:
    own = tmp_path / "prices.yaml"
    own.write_text("multiplier: 2\n")
    assert json.loads(run(json.dumps(ANSWER), "--prices", str(own)).stdout)["cost_nano"] == 32_604_000


# Speed: a tap sees every byte of every stream, so metering must cost much less than parsing.


def stream(deltas: int) -> list[bytes]:
    opening = b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
    words = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"word %d \\n and on"}}\n\n'
    ending = b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":%d}}\n\n'
    return [START, opening, *[words % number for number in range(deltas)], ending % deltas]


def median_s(work: Callable[[], None]) -> float:
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@pytest.mark.soak  # a ratio of times: not for a busy machine
def test_metering_is_faster_than_parsing_each_event() -> None:
    events = stream(20_000)
    body = b"".join(events)
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    chunks = [body[at : at + 65_536] for at in range(0, len(body), 65_536)]

    def parse() -> None:
        for line in lines:
            json.loads(line)

    def feed(pieces: list[bytes]) -> Callable[[], None]:
        def work() -> None:
            reader = Meter("text/event-stream")
            for piece in pieces:
                reader.feed(piece)
            assert reader.close().tokens.output_tokens == 20_000

        return work

    parsing_s = median_s(parse)
    assert parsing_s / median_s(feed(chunks)) >= 3
    assert parsing_s / median_s(feed(events)) >= 1.5
