"""A stream as bytes: the request that asks for it, its events, and what a reader of chunks makes of a body."""

import json

import h11
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from upstreams import event

START = event("message_start", message={"id": "msg_1", "type": "message", "model": "claude-haiku-4-5", "usage": {"input_tokens": 9, "output_tokens": 1}})
BLOCK = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
DELTAS = [event("content_block_delta", index=0, delta={"type": "text_delta", "text": f"word {each} "}) for each in range(12)]
END = [event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 24}), event("message_stop")]
EVENTS = [START, BLOCK, *DELTAS, *END]
ASK = json.dumps({"model": "claude-haiku-4-5", "max_tokens": 100, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}).encode()


def read(reader, pieces):
    """A body as a reader sees it: the bytes in it, how it ended, and what is left."""
    buffer, content = ReceiveBuffer(), b""
    for piece in pieces:
        if (at_once := getattr(reader, "content", None)) and not buffer and (whole := at_once(piece)) is not None:
            content += whole
            continue
        buffer += piece
        while True:
            try:
                found = reader(buffer)
            except h11.ProtocolError as error:
                return content, str(error), b""
            if found is None:
                break
            if isinstance(found, h11.EndOfMessage):
                return content, dict(found.headers), bytes(buffer) + b"".join(pieces[pieces.index(piece) + 1 :])
            content += found.data
    return content, None, vars(reader)


def request(gw, body: bytes = ASK) -> bytes:
    return f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {gw.tokens['app']}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def payload(answer: bytes) -> bytes:
    """Return the content of a chunked answer that ended properly."""
    content, ending, left = read(ChunkedReader(), [answer.partition(b"\r\n\r\n")[2]])
    assert (ending, left) == ({}, b"")
    return content
