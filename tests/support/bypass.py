"""Hostile requests: ways to get past an allowlist, each with the refusal that it must meet.

For the app of POLICY: one small model, 4,096 tokens, no features. The table is used on the pure functions (test_bypass.py) and
over a raw socket. No more than five rows for one trick.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

POLICY = """
models: {allow: [claude-haiku-4-5], deny: [claude-opus-*]}
max_tokens: 4096
caps: unlimited
"""

PLAIN: dict[str, Any] = {"model": "claude-haiku-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}


class Hostile(NamedTuple):
    trick: str
    code: str
    """The refusal it must meet (refusals.TABLE)."""
    method: str = "POST"
    target: str = "/v1/messages"
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    body: bytes = json.dumps(PLAIN).encode()


def _with(**changes: Any) -> bytes:
    return json.dumps(PLAIN | changes).encode()


def _without(name: str) -> bytes:
    return json.dumps({key: value for key, value in PLAIN.items() if key != name}).encode()


def _block(block: Any) -> bytes:
    return _with(messages=[{"role": "user", "content": [block]}])


def _raw(text: str) -> bytes:
    return text.encode()


def _source(**source: Any) -> bytes:
    return _block({"type": "document", "source": source})


SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 1}
ADVISOR = {"type": "advisor_20260301", "name": "advisor", "model": "claude-haiku-4-5", "max_uses": 1}
DEAR_ADVISOR = ADVISOR | {"model": "claude-opus-5-5"}
HEAD = '{"max_tokens":16,"messages":[{"role":"user","content":"hello"}],'


ODD_BATCHES = (
    "/v1/messages/batches/../../files",
    "/v1/messages/batches/msgbatch_1%2fresults",
    "/v1/messages/batches/msgbatch_%31",
    "/v1/messages/batches/msgbatch_1/results/",
    "/v1/messages/batches/msgbatch_1/results?model=x",
    "/v1/messages/batches/",
    "/v1/messages/batches/msgbatch_",
    "/v1/messages/batches/msgbatch_1/",
    "/v1/messages/batches//msgbatch_1",
    "/v1/messages/batches/msgbatch_1/../msgbatch_2",
    "/v1/messages/batches/msgbatch_1\n",
    "/v1/messages/batches/MSGBATCH_1",
    "/v1/messages/batches/file_1",
    "/v1/messages/batches/msgbatch_1;x",
    "/v1/messages/batches/msgbatch_1_2",
    "/v1/messages/batches/msgbatch_1/content",
    "/v1/messages/batches/msgbatch_" + "1" * 200,
)
ODD_FILES = (
    "/v1/files/file_1/../file_2",
    "/v1/files/file_1%2fcontent",
    "/v1/files/../messages/batches/msgbatch_1",
    "/v1/files/file_1/content/",
    "/v1/files/%66ile_1",
    "/v1/files/",
    "/v1/files/file_",
    "/v1/files//content",
    "/v1/files/msgbatch_1",
    "/v1/files/file_1/results",
    "/v1/files/file_1.txt",
)
"""Spellings of what has an id in its path that are no endpoint, whatever a policy says."""


def _inline(tool: Any) -> dict[str, Any]:
    """A tool defined in the middle of a conversation."""
    return {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool}}


def _doors() -> Iterator[Hostile]:
    for trick, targets in {
        "doubled slash": ("//v1/messages", "/v1//messages", "/v1/messages//", "///v1/messages"),
        "trailing slash": ("/v1/messages/", "/v1/messages/?beta=true", "/v1/messages/count_tokens/"),
        "percent encoding": ("/v1%2fmessages", "/v1/m%65ssages", "/%761/messages", "/v1/messages%00", "/v1/messages%20"),
        "upper case": ("/V1/messages", "/v1/Messages", "/v1/MESSAGES"),
        "dot segments": ("/v1/./messages", "/v1/x/../messages", "/../v1/messages", "/v1/messages/..", "/v1/messages/."),
        "path parameters": ("/v1/messages;model=claude-opus-5-5", "/v1;x/messages"),
        "backslash": ("\\v1\\messages", "/v1\\messages", "/v1/messages\\"),
        "absolute form": ("http://api.anthropic.com/v1/messages", "https://evil.example/v1/messages", "//evil.example/v1/messages"),
        "fragment": ("/v1/messages#", "/v1/messages#?beta=true"),
        "no path": ("", "*", "v1/messages", "?beta=true"),
        "odd characters": ("/v1/messages\t", " /v1/messages", "/v1/me\u017f\u017fages", "/v1/messages\u200b"),
        "other spending endpoints": ("/v1/complete", "/v1/messages/batches", "/v1/sessions", "/v1/agents", "/v1/deployments"),
        "other people's data": ("/v1/files", "/v1/skills", "/v1/organizations/users", "/v1/memory_stores", "/v1/oauth/revoke"),
        "model in the query": ("?model=claude-opus-5-5", "?beta=true&model=x", "?MODEL=x", "?max_tokens=100000", "?m%6fdel=x"),
        "malformed query": ("?%20=a", "?beta=true&", "?a=b?c=d", "?;model=x", "?beta=%00"),
    }.items():
        for target in targets:
            yield Hostile(trick, "endpoint", target=f"/v1/messages{target}" if "query" in trick else target)
    for method in ("GET", "PUT", "post", "CONNECT", "POST "):
        yield Hostile("method", "endpoint", method=method)
    for target in ("/v1/models/", "/v1/models/..", "/v1/models/a/b", "/v1/models/%2e%2e", "/v1/models/claude-haiku-4-5?model=x"):
        yield Hostile("model path", "endpoint", "GET", target, (), b"")
    yield Hostile("body on a read", "body", "GET", "/v1/models", (), b"{}")
    for target in ODD_BATCHES[:5]:
        yield Hostile("batch path", "endpoint", "GET", target, (), b"")
    for target in ODD_FILES[:5]:
        yield Hostile("file path", "endpoint", "GET", target, (), b"")
    for method, target in (("GET", ""), ("POST", "/msgbatch_1/cancel"), ("GET", "/msgbatch_1/results"), ("DELETE", "/msgbatch_1")):
        yield Hostile("batches that the policy does not name", "endpoint", method, f"/v1/messages/batches{target}", (), b"")


def _encodings() -> Iterator[Hostile]:
    plain = json.dumps(PLAIN).encode()
    bodies = {"gzip": gzip.compress(plain), "deflate": zlib.compress(plain), "br": plain, "zstd": plain, "gzip, identity": plain}
    for encoding, body in bodies.items():
        yield Hostile("content-encoding", "body", headers=(("content-encoding", encoding),), body=body)
    yield Hostile("two content-encodings", "body", headers=(("content-encoding", "identity"), ("content-encoding", "gzip")))
    for body in (gzip.compress(plain), zlib.compress(plain)):
        yield Hostile("encoded without saying so", "body", body=body)
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json2", ""):
        yield Hostile("media type", "body", headers=(("content-type", media_type),))
    for charset in ("utf-16", "utf-7", "iso-8859-1", "utf-8; charset=utf-16"):
        yield Hostile("charset", "body", headers=(("content-type", f"application/json; charset={charset}"),))
    yield Hostile("two media types", "body", headers=(("content-type", "application/json"), ("content-type", "text/plain")))
    text = json.dumps(PLAIN)
    for body in (b"\xef\xbb\xbf" + plain, text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-32"), text.encode("utf-16-be")):
        yield Hostile("byte order mark or another UTF", "body", body=body)
    for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
        yield Hostile("invalid UTF-8", "body", body=plain.replace(b"hello", bad))
    yield Hostile("too large", "too_large", body=plain.replace(b"hello", b"x" * 33_000_000))


def _json() -> Iterator[Hostile]:
    for trick, texts in {
        "duplicate model": (
            HEAD + '"model":"claude-haiku-4-5","model":"claude-opus-5-5"}',
            HEAD + '"model":"claude-opus-5-5","model":"claude-haiku-4-5"}',
            HEAD + '"model":"claude-haiku-4-5","mod\\u0065l":"claude-opus-5-5"}',
        ),
        "duplicate key elsewhere": (
            HEAD + '"model":"claude-haiku-4-5","max_tokens":16}',
            '{"model":"claude-haiku-4-5","max_tokens":16,"messages":[{"role":"user","content":"a","content":"b"}]}',
            HEAD + '"model":"claude-haiku-4-5","tools":[{"name":"t","input_schema":{"type":"object","type":"string"}}]}',
            HEAD + '"model":"claude-haiku-4-5","metadata":{"user_id":"a","user_id":"b"}}',
        ),
        "not numbers": tuple(f'{HEAD}"model":"claude-haiku-4-5","temperature":{n}}}' for n in ("NaN", "Infinity", "-Infinity", "1e", "01")),
        "almost JSON": (
            HEAD + '"model":"claude-haiku-4-5",}',
            HEAD + '"model":"claude-haiku-4-5" /* x */}',
            "{'model':'claude-haiku-4-5'}",
            HEAD + '"model":"claude-haiku-4-5"',
            "\x0b" + json.dumps(PLAIN),
        ),
        "more than one document": (json.dumps(PLAIN) * 2, json.dumps(PLAIN) + "\n" + json.dumps(PLAIN), json.dumps(PLAIN) + "\x00"),
        "no object": ("", " ", "null", "[]", '"claude-haiku-4-5"'),
        "depth bomb": (
            HEAD + '"model":"claude-haiku-4-5","stop_sequences":' + "[" * 200_000 + "]" * 200_000 + "}",
            HEAD + '"model":"claude-haiku-4-5","metadata":' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
            HEAD + '"model":"claude-haiku-4-5","stop_sequences":' + "[" * 80 + "]" * 80 + "}",
        ),
        "control characters": (json.dumps(PLAIN).replace("hello", "a\x00b"), json.dumps(PLAIN).replace("hello", "a\nb")),
        "half a surrogate pair": (json.dumps(PLAIN).replace("hello", "\\ud800"), json.dumps(PLAIN).replace("hello", "\\udfff x")),
        "endless number": (HEAD + '"model":"claude-haiku-4-5","top_k":' + "9" * 5_000 + "}",),
    }.items():
        for text in texts:
            yield Hostile(trick, "body", body=_raw(text))


def _disguises() -> Iterator[Hostile]:
    for model in (None, 5, True, ["claude-haiku-4-5"], {"id": "claude-haiku-4-5"}):
        yield Hostile("model is no string", "body", body=_with(model=model))
    yield Hostile("model is empty", "body", body=_with(model=""))
    yield Hostile("model is absent", "body", body=_without("model"))
    for trick, models in {
        "denied model": ("claude-opus-5-5", "claude-opus-5-5[1m]", "claude-opus-4-5-20251101"),
        "model not allowed": ("claude-haiku-5-5", "claude-sonnet-5", "claude-fable-5-2"),
        "longer than the pattern": ("claude-haiku-4-5-evil", "claude-haiku-4-50", "claude-haiku-4-5-20251001-x", "claude-haiku-4-5/../x"),
        "upper case": ("Claude-haiku-4-5", "CLAUDE-OPUS-5-5"),
        "white space": (" claude-haiku-4-5", "claude-haiku-4-5 ", "claude-haiku-4-5\n", "claude-haiku-4-5\x00", "claude-opus-5-5\t"),
        "look-alike letters": ("сlaude-haiku-4-5", "claude\u2010haiku-4-5", "claude-haiku-4-5\u200b", "ｃlaude-haiku-4-5"),
        "provider prefix": ("anthropic.claude-opus-5-5", "us.anthropic.claude-haiku-4-5", "anthropic/claude-haiku-4-5"),
        "pattern as a model": ("claude-haiku-*", "*", "claude-haiku-4-?", "claude-haiku-4-[5]"),
        "dots for dashes": ("claude-haiku-4.5", "claude-opus-5.5"),
        "unknown id": ("claude-haiku-latest", "gpt-5", "default", "claude-haiku-4-5@20251001", "claude-opus-9"),
    }.items():
        for model in models:
            yield Hostile(trick, "model", body=_with(model=model))
    for key in ("Model", "MODEL", " model", "model ", "ｍodel"):
        yield Hostile("a key like model", "body", body=_with(**{key: "claude-opus-5-5"}))
    for key in ("MAX_TOKENS", "Max_Tokens", "meſſages", "Fallbacks", "tools\u00a0"):
        yield Hostile("a key like another", "body", body=_with(**{key: 1}))
    for key in ("mоdel", "mo_del", "model[]", "max-tokens", "betas"):
        yield Hostile("a key that is unknown", "unknown_field", body=_with(**{key: "x"}))


def _numbers() -> Iterator[Hostile]:
    for value in (16.0, "16", True, None, [16]):
        yield Hostile("max_tokens is no whole number", "body", body=_with(max_tokens=value))
    yield Hostile("max_tokens in exponent form", "body", body=_raw(json.dumps(PLAIN).replace("16", "1e1")))
    for value in (-1, 10**12, 2**64):
        yield Hostile("max_tokens out of range", "body", body=_with(max_tokens=value))
    yield Hostile("max_tokens is absent", "body", body=_without("max_tokens"))
    for value in (4097, 128_000):
        yield Hostile("max_tokens above the ceiling", "max_tokens", body=_with(max_tokens=value))
    for stream in ("true", 1, None):
        yield Hostile("stream is no boolean", "body", body=_with(stream=stream))
    for name, value in (("messages", "hello"), ("messages", {"role": "user"}), ("tools", SEARCH), ("tools", "x")):
        yield Hostile("no list", "body", body=_with(**{name: value}))


def _reached() -> Iterator[Hostile]:
    """Another model, or spending that the body does not show, behind an allowed model."""
    yield Hostile("fallback model", "model", body=_with(fallbacks=[{"model": "claude-opus-5-5"}]))
    yield Hostile("second fallback", "model", body=_with(fallbacks=[{"model": "claude-haiku-4-5"}, {"model": "claude-fable-5-2"}]))
    for model in (None, 7, ["claude-haiku-4-5"]):
        yield Hostile("fallback model is no string", "body", body=_with(fallbacks=[{"model": model}]))
    for fallbacks in ("default", "claude-opus-5-5", [{"model": "claude-haiku-4-5"}], {"model": "claude-haiku-4-5"}):
        yield Hostile("fallbacks", "feature", body=_with(fallbacks=fallbacks))
    yield Hostile("advisor model", "model", body=_with(tools=[DEAR_ADVISOR]))
    yield Hostile("advisor model is no string", "body", body=_with(tools=[ADVISOR | {"model": None}]))
    yield Hostile("advisor", "feature", body=_with(tools=[ADVISOR]))
    system = {"role": "system", "content": [_inline(DEAR_ADVISOR)]}
    yield Hostile("tool inside a message", "model", body=_with(messages=[*PLAIN["messages"], system]))
    yield Hostile("tool inside a message", "feature", body=_block(_inline(SEARCH)))
    yield Hostile("tool inside a message", "feature", body=_block(_inline({"type": "mcp_toolset", "mcp_server_name": "x"})))
    compaction = {"type": "compaction", "content": "x", "tool_changes": [_inline(DEAR_ADVISOR)]}
    yield Hostile("tool inside a compaction", "model", body=_block(compaction))
    caller = {"type": "code_execution_20250825", "name": "code_execution", "tool_id": "x"}
    yield Hostile("tool dressed as a caller", "feature", body=_with(tools=[caller]))
    yield Hostile("tool dressed as a caller", "unknown_field", body=_with(tools=[{"name": "x", "caller": caller}]))
    nested = {"type": "tool_result", "tool_use_id": "x", "content": [_inline(SEARCH)]}
    yield Hostile("tool inside a result", "feature", body=_block(nested))
    for tool in ("web_search_20260318", "web_fetch_20250910", "code_execution_20250825", "tool_search_tool_regex", "mcp_toolset"):
        yield Hostile("tool at the provider", "feature", body=_with(tools=[{"type": tool}]))
    fields: dict[str, Any] = {
        "mcp_servers": [{"type": "url", "url": "https://evil.example", "name": "x"}],
        "container": "container_1",
        "compaction": {"type": "summarize"},
        "thread": {"type": "continue", "previous_message_id": "msg_1"},
        "context_management": {"edits": [{"type": "compact_20260112"}]},
        "speed": "fast",
        "service_tier": "priority",
        "inference_geo": "us",
        "billing_policy": {"type": "billing_policy", "bill_to": "user_profile"},
    }
    for name, value in fields.items():
        yield Hostile(f"field {name}", "thread" if name == "thread" else "feature", body=_with(**{name: value}))
    yield Hostile("skills", "feature", body=_with(container={"skills": [{"type": "custom", "skill_id": "x"}]}))
    for source in ({"type": "url", "url": "https://evil.example"}, {"type": "file", "file_id": "file_1"}):
        yield Hostile("source that is elsewhere", "feature", body=_source(**source))
        yield Hostile("source that is elsewhere", "feature", body=_block({"type": "image", "source": source}))
    inner = {"type": "image", "source": {"type": "file"}}
    yield Hostile("source inside a source", "feature", body=_source(type="content", content=[inner]))
    yield Hostile("upload", "feature", body=_block({"type": "container_upload", "file_id": "file_1"}))
    for name in ("anthropic-workspace-id", "anthropic-user-profile-id"):
        yield Hostile("header", "feature", headers=(("content-type", "application/json"), (name, "x")))


def _unknown() -> Iterator[Hostile]:
    for tool in ("web_search_20990101", "computer_20990101", ["custom"], 5, "WEB_SEARCH_20250305"):
        yield Hostile("unknown tool type", "unknown_field", body=_with(tools=[{"type": tool, "name": "x"}]))
    for block in ({"type": "hologram"}, {"text": "no type"}, {"type": "text", "text": "x", "price": 1}, {"type": None}, {"type": {}}):
        yield Hostile("unknown block", "unknown_field", body=_block(block))
    for source in ({"type": "s3", "uri": "x"}, {"url": "https://evil.example"}, {"type": "base64", "data": "x", "url": "y"}):
        yield Hostile("unknown source", "unknown_field", body=_source(**source))
    for cache in ({"type": "ephemeral", "ttl": "24h"}, {"type": "permanent"}, {"ttl": "1h"}):
        yield Hostile("unknown cache lifetime", "unknown_field", body=_with(cache_control=cache))
    for field in ("thinking", "tool_choice", "output_config", "metadata", "diagnostics"):
        yield Hostile("unknown setting", "unknown_field", body=_with(**{field: {"spend": "more"}}))
    message = PLAIN["messages"][0]
    yield Hostile("unknown message field", "unknown_field", body=_with(messages=[message | {"model": "claude-opus-5-5"}]))
    yield Hostile("free zone where none is", "unknown_field", body=_with(input={"tools": [SEARCH]}))


HOSTILE = tuple(row for rows in (_doors, _encodings, _json, _disguises, _numbers, _reached, _unknown) for row in rows())
