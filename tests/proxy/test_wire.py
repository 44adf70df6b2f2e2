"""Hostile bytes on a raw socket: each has one answer, in the API's shape, and not a byte of it reaches the API."""

import asyncio
import contextlib
import json

import pytest
from bypass import HOSTILE, PLAIN, POLICY, Hostile
from gateway import gateway
from rawhttp import send, split_answer

from gateway_addon.simulator import Simulator

BODY = json.dumps(PLAIN).encode()


def request(row, token: str) -> bytes:
    headers = [("host", "gateway"), ("x-api-key", token), ("anthropic-version", "2023-06-01"), ("connection", "close"), *row.headers]
    if not any(name == "content-length" for name, _ in headers):
        headers.append(("content-length", str(len(row.body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"{row.method} {row.target} HTTP/1.1\r\n{head}\r\n".encode() + row.body


async def test_no_hostile_request_of_the_table_reaches_the_api(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": POLICY}) as gw:
        assert b" 200 " in (await send(gw, request(Hostile("none", ""), gw.tokens["app"]))).split(b"\r\n")[0]
        await api.settled()
        before = api.book.bytes_received
        for index, row in enumerate(HOSTILE):
            if (row.method, row.target) != (row.method.strip(), row.target.strip(" \t")):
                continue  # white space ends a word of the request line: judged and sent is the bare one
            status, headers, body = split_answer(await send(gw, request(row, gw.tokens["app"])))
            assert status >= 400, (index, row.trick, status)
            if row.method != "HEAD":
                assert json.loads(body)["type"] == "error", (index, row.trick)
            assert headers.get("x-gateway-refusal") or status == 400, (index, row.trick)
        assert api.book.bytes_received == before


def raw(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


LENGTH = f"content-length: {len(BODY)}"
SMUGGLED = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
FRAMED = {
    "both lengths": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", LENGTH, "transfer-encoding: chunked", body=BODY), 400),
    "two lengths": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", LENGTH, "content-length: 3", body=BODY), 400),
    "a negative length": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "content-length: -1"), 400),
    "a length in words": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "content-length: ten"), 400),
    "chunked twice": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "transfer-encoding: chunked, chunked"), 400),
    "an unknown encoding": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "transfer-encoding: xchunked"), 400),
    "a space before the colon": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", f"content-length : {len(BODY)}", body=BODY), 400),
    "a folded header": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "x-a: b\r\n c", LENGTH, body=BODY), 400),
    "a bare carriage return": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "anthropic-beta: a\rx-b: c", LENGTH, body=BODY), 400),
    "a nul": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "anthropic-beta: a\0b", LENGTH, body=BODY), 400),
    "compressed and chunked": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "transfer-encoding: gzip, chunked", body=b"0\r\n\r\n"), 400),
    "chunks without a length": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "transfer-encoding: chunked", body=b"zz\r\n"), 400),
    "chunked in HTTP/1.0": (raw("POST /v1/messages HTTP/1.0", "host: x", "x-api-key: {token}", "transfer-encoding: chunked", body=b"0\r\n\r\n"), 400),
    "bare line feeds": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", LENGTH).replace(b"\r\n", b"\n") + BODY.replace(b"haiku-4-5", b"haiku-9-9"), 403),
    "a bare line feed in a header": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", f"x-a: b\n{LENGTH}", "content-length: 3", body=BODY), 400),
    "no version": (raw("POST /v1/messages", "host: x"), 400),
    "a head without an end": (b"POST /v1/messages HTTP/1.1\r\nx: " + b"a" * 200_000, 400),
    "another host in the first line": (raw("POST http://evil.example/v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", LENGTH, body=BODY), 400),
    "connect": (raw("CONNECT evil.example:443 HTTP/1.1", "host: evil.example:443"), 400),
    "upgrade": (raw("GET /v1/models HTTP/1.1", "host: x", "x-api-key: {token}", "connection: upgrade", "upgrade: websocket"), 403),
    "http/2 in clear": (b"PRI * HTTP/2.0\r\n\r\n", 400),
    "no token and a large body": (raw("POST /v1/messages HTTP/1.1", "host: x", "content-length: 30000000", body=b"{"), 401),
    "no token and a body without a length": (raw("POST /v1/messages HTTP/1.1", "host: x", "transfer-encoding: chunked", body=b"5\r\n{}{}{\r\n"), 401),
    "33 megabytes": (raw("POST /v1/messages HTTP/1.1", "host: x", "x-api-key: {token}", "content-length: 40000000", body=b"{"), 413),
}


SAID = {
    "both lengths": "has a Content-Length and a Transfer-Encoding",
    "a folded header": "The value of the header x-a has a line break or a NUL in it",
    "a bare carriage return": "The value of the header anthropic-beta has a line break",
    "a nul": "The value of the header anthropic-beta has a line break or a NUL in it",
    "compressed and chunked": "Transfer-Encoding is 'gzip, chunked'",
    "chunks without a length": "is not well-formed HTTP/1.1",
    "chunked in HTTP/1.0": "is HTTP/1.0, which knows no Transfer-Encoding",
    "http/2 in clear": "speaks HTTP/2.0 in clear",
    "another host in the first line": "names another host in its first line",
    "33 megabytes": "larger than the gateway takes (33 MB)",
}
"""What the caller is told, where a wrong sentence was told once."""


@pytest.mark.parametrize("trick", FRAMED)
async def test_request_that_two_parsers_frame_differently_is_refused(tmp_path, trick):
    """A request that two parsers could frame differently is refused."""
    data, wanted = FRAMED[trick]
    async with Simulator() as api, gateway(tmp_path, api, {"app": POLICY}) as gw:
        answer = await send(gw, data.replace(b"{token}", gw.tokens["app"].encode()))
        assert answer.startswith(b"HTTP/1.1 "), answer[:200]
        status, headers, body = split_answer(answer)
        assert status == wanted, body
        assert headers["content-type"] == "application/json"
        assert json.loads(body)["type"] == "error"
        assert SAID.get(trick, "") in json.loads(body)["error"]["message"]
        assert api.book.bytes_received == 0
        assert not await gw.open_calls()


GOOD = ("host: x", "authorization: Bearer {token}", "anthropic-version: 2023-06-01", "content-type: application/json", "connection: close", LENGTH)
LET_IN = {
    "an empty query": raw("POST /v1/messages? HTTP/1.1", *GOOD, body=BODY),
    "a space in a query's value": raw("POST /v1/messages?source=my%20app HTTP/1.1", *GOOD, body=BODY),
    "an empty key beside a good token": raw("POST /v1/messages HTTP/1.1", "x-api-key:", *GOOD, body=BODY),
    "empty lines before the request": b"\r\n\r\n" + raw("POST /v1/messages HTTP/1.1", *GOOD, body=BODY),
}


@pytest.mark.parametrize("oddity", LET_IN)
async def test_what_is_odd_and_has_one_meaning_is_let_in(tmp_path, oddity):
    async with Simulator() as api, gateway(tmp_path, api, {"app": POLICY}) as gw:
        answer = await send(gw, LET_IN[oddity].replace(b"{token}", gw.tokens["app"].encode()))
        assert split_answer(answer)[0] == 200, answer
        assert len((await api.settled()).messages()) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_http_1_0_gets_no_chunks(tmp_path, stream):
    async with Simulator() as api, gateway(tmp_path, api, {"app": POLICY}) as gw:
        body = json.dumps(PLAIN | {"stream": stream}).encode()
        lines = [line for line in GOOD if not line.startswith(("connection", "content-length"))]
        data = raw("POST /v1/messages HTTP/1.0", *lines, f"content-length: {len(body)}", body=body)
        answer = await send(gw, data.replace(b"{token}", gw.tokens["app"].encode()))
        status, headers, said = split_answer(answer)
        assert status == 200, answer
        assert "transfer-encoding" not in headers
        assert said.startswith(b"event: " if stream else b"{")
        assert said.rstrip().endswith(b"}")


async def test_a_pipelined_request_is_judged_by_itself(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": POLICY}) as gw:
        good = raw("POST /v1/messages HTTP/1.1", "host: x", f"x-api-key: {gw.tokens['app']}", "anthropic-version: 2023-06-01", "content-type: application/json", LENGTH, body=BODY)
        answer = await send(gw, raw("HEAD /gateway/readyz HTTP/1.1", "host: x") + good + SMUGGLED)
        ready, _, rest = answer.partition(b"\r\n\r\n")
        assert ready.startswith(b"HTTP/1.1 200")
        assert rest.startswith(b"HTTP/1.1 200"), "no body is in between"
        assert b"HTTP/1.1 401" in answer, "without a token of its own"
        assert [row.target for row in (await api.settled()).all()] == ["/v1/messages"]


@pytest.mark.parametrize(("known", "answers"), [(True, (b"100", b"200")), (False, (b"100", b"401"))])
async def test_expect_100_continue_goes_on_and_the_body_is_judged(tmp_path, known, answers):
    """A client that asks before it sends its body is told to go on, and is judged all the same."""
    async with Simulator() as api, gateway(tmp_path, api, {"app": POLICY}) as gw:
        token = gw.tokens["app"] if known else "nobody"
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        with contextlib.closing(writer):
            writer.write(raw("POST /v1/messages HTTP/1.1", "host: x", f"x-api-key: {token}", "anthropic-version: 2023-06-01", "content-type: application/json", LENGTH, "expect: 100-continue"))
            for answer in answers:
                status = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).split()[1]
                assert status == answer
                if status == b"100":
                    writer.write(BODY)
        assert len((await api.settled()).messages()) == int(known)


async def test_a_chunked_body_is_read_judged_and_passed_on(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": POLICY}) as gw:
        head = ("POST /v1/messages HTTP/1.1", "host: x", f"x-api-key: {gw.tokens['app']}", "anthropic-version: 2023-06-01", "content-type: application/json", "transfer-encoding: chunked")
        answer = await send(gw, raw(*head, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)))
        assert answer.startswith(b"HTTP/1.1 200")
