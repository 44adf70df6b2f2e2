"""Parse a request strictly: the bytes that are judged are the bytes that are sent.

Promises to refuse every body that two parsers could read differently (a key given twice, a byte order mark, an odd spelling of
a path): the provider sees the model and the limits that were judged. Pure: no clock, no files, no
policy; it knows the API's shape, not who may use it.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Never

from gateway_addon.messages.labels import SaidLabel, said_labels
from gateway_addon.messages.nfkc import nfkc_growth
from gateway_addon.messages.scan import FeatureUse, RequestScan, scan_request
from gateway_addon.messages.schema import HEADER_FEATURES, UNTYPED
from gateway_addon.refusals import Refusal, stated

BODY_BYTES_MAX = 32_000_000
"""The API's own limit for one message request (platform documentation, "Errors": request_too_large)."""

VALUES_MAX = 2_000_000
"""JSON values in one body. The API takes 100,000 messages, or requests of a batch, which need a tenth to a half of that; 31 MB of
`[[],[],...]` would be ten million lists, 25 s and a gigabyte."""

MODEL_CHARACTERS_MAX = 256
FILES_MAX = 20_000
"""Files at the provider that one body names: each is looked up in the ledger."""

MAX_TOKENS_MAX = 10_000_000
"""More than any model can write (128,000, 300,000 in batches): beyond it the arithmetic is not worth doing."""

ENDPOINTS: dict[tuple[str, str], str] = {
    ("POST", "/v1/messages"): "messages",
    ("POST", "/v1/messages/count_tokens"): "count_tokens",
    ("GET", "/v1/models"): "models",
    ("POST", "/v1/messages/batches"): "batches.create",
    ("GET", "/v1/messages/batches"): "batches.list",
    ("POST", "/v1/files"): "files.upload",
    ("GET", "/v1/files"): "files.list",
    ("HEAD", "/api/hello"): "hello",
    ("GET", "/api/hello"): "hello",
    ("HEAD", "/gateway/healthz"): "healthz",
    ("GET", "/gateway/healthz"): "healthz",
    ("HEAD", "/gateway/readyz"): "readyz",
    ("GET", "/gateway/readyz"): "readyz",
    ("GET", "/gateway/me"): "me",
    ("GET", "/gateway/metrics"): "metrics",
    ("GET", "/api/oauth/usage"): "usage",
    ("POST", "/v1/oauth/token"): "exchange",
}
"""All endpoints but those with an id in the path (`ITEMS`, models). Any other method and path is refused."""

MESSAGES = ("messages", "batch_request")
"""Kinds of request that make a model generate: a message, and each request of a batch, judged like a message."""

ITEMS: dict[tuple[str, str], str] = {
    ("GET", "/v1/messages/batches/{}"): "batches.get",
    ("DELETE", "/v1/messages/batches/{}"): "batches.delete",
    ("POST", "/v1/messages/batches/{}/cancel"): "batches.cancel",
    ("GET", "/v1/messages/batches/{}/results"): "batches.results",
    ("GET", "/v1/files/{}"): "files.get",
    ("DELETE", "/v1/files/{}"): "files.delete",
    ("GET", "/v1/files/{}/content"): "files.content",
}
"""Endpoints of one batch or one file, whose id stands where the braces are."""

_MODEL_PATH = re.compile(r"/v1/models/([A-Za-z0-9][A-Za-z0-9._-]{0,199})\Z")
_ITEM_PATH = re.compile(r"(/v1/messages/batches/(?=msgbatch_)|/v1/files/(?=file_))((?:msgbatch|file)_[A-Za-z0-9]{1,128})(/[a-z]+)?\Z")
_PAIR = r"(?:[A-Za-z0-9_.\[\]-]|%5[BbDd])+(?:=(?:[A-Za-z0-9_.:+-]|%20)*)?"  # brackets, plain and as some clients write them
_QUERY = re.compile(rf"{_PAIR}(?:&{_PAIR})*\Z")
DEEP = "the body is nested too deeply to be read safely; flatten it"
_VALUE_MARKS = (b",", b"[", b"{")
_NO_MARKS = bytes(set(range(256)) - {*b'",[{'})
_KNOWN_FIELDS = {name.casefold(): name for name in UNTYPED[""]}
_KNOWN_FIELD_CHARACTERS_MAX = max(map(len, _KNOWN_FIELDS))


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it arrived: target undecoded, header names in lower case, the body as bytes."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    fixed_labels: tuple[tuple[str, str], ...] = ()
    """The labels of its caller's token, by name: the operator's word, which no header changes."""

    def header(self, name: str) -> tuple[str, ...]:
        """Return every value sent for a header."""
        return tuple([value for key, value in self.headers if key == name])


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as parsed. `model` is the id as asked; for `model` requests it is the id in the path."""

    endpoint: str
    model: str = ""
    max_tokens: int = 0
    stream: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0
    """Bytes of the body as sent."""
    text_bytes: int = 0
    """An upper bound of the prompt's bytes as any tokenizer may see them: see `_text_bytes`."""
    betas: tuple[str, ...] = ()
    found: RequestScan = field(default_factory=RequestScan)
    item: str = ""
    """The id in the path, of a batch or a file."""
    labels: tuple[SaidLabel, ...] = ()
    """The labels that it says, and nobody has judged."""
    fixed_labels: tuple[tuple[str, str], ...] = ()
    """The labels of its caller's token, as in `Request`."""

    @property
    def shared(self) -> bool:
        """Return whether a request is about batches or files, which live in the workspace that all apps share."""
        return self.endpoint.startswith(("batches.", "files."))

    @property
    def cache_control(self) -> bool:
        """Return whether the request asks for a cache write."""
        return self.found.cache_control

    @property
    def hour_ttl(self) -> bool:
        """Return whether the request asks for a cache write of an hour (or of an unknown length)."""
        return self.found.hour_ttl


class Unreadable(Exception):
    """A body without a single reading, with the reason; `read` makes a Refusal of it."""


def endpoint_of(method: str, target: str) -> str | Refusal:
    """Name the endpoint of a request line, exactly as spelled (`//v1/messages`, `%2f` and the like have no endpoint).

    A query is tolerated (Claude Code sends `?beta=true`) as long as it is plain and restates no field of the body:
    `?model=` has beaten the body's model in other gateways.
    """
    path, _, query = target.partition("?")
    name = ENDPOINTS.get((method, path))
    if name is None and method == "GET" and _MODEL_PATH.match(path):
        name = "model"
    if name is None and (item := _ITEM_PATH.match(path)):
        name = ITEMS.get((method, f"{item[1]}{{}}{item[3] or ''}"))
    if name is None:
        shown = target[:100].encode("ascii", "backslashreplace").decode()
        served = "POST /v1/messages, GET /gateway/me and what `endpoints` in the policy opens"
        return stated("endpoint", f"{method[:20]} {shown} is not served here; this gateway serves {served}")
    known = query and any(part.partition("=")[0].casefold() in _KNOWN_FIELDS for part in query.split("&"))
    if query and name != "me" and (known or not _QUERY.match(query)):
        return stated("endpoint", f"the query {query[:100]!r} is not served here; {path} takes its fields from the body alone")
    return name


def read(endpoint: str, request: Request) -> ParsedRequest | Refusal:
    """Parse a request of a known endpoint, strictly. A body without a single reading is a Refusal (`body`, `too_large`)."""
    if len(request.body) > BODY_BYTES_MAX:
        whose = "API" if endpoint in ("messages", "count_tokens") else "gateway"
        limits = f"the body has {len(request.body):,} bytes, the {whose} takes {BODY_BYTES_MAX:,}"
        return stated("too_large", f"{limits}; send less in one request")
    if endpoint not in ("messages", "count_tokens"):
        return _read_head(endpoint, request)
    try:
        return message(endpoint, json_body(request), request.body, request)
    except (Unreadable, ValueError) as error:
        return stated("body", f"{error}")
    except RecursionError:
        return stated("body", DEEP)


def json_body(request: Request) -> dict[str, Any]:
    """Parse a body as one JSON object. Raises Unreadable, RecursionError."""
    _plain_json_headers(request)
    return _json_object(request.body)


def message(endpoint: str, body: dict[str, Any], raw: bytes, request: Request) -> ParsedRequest:
    """Parse a message's parameters: a request's body, or one request of a batch. `raw`: the parameters as bytes.

    Raises Unreadable, ValueError or RecursionError, with a sentence.
    """
    found = scan_request(body)
    _readable_fields(endpoint, body, found)
    text_bytes = _text_bytes(raw, body, found)
    found.uses.extend(header_uses(request))
    return ParsedRequest(
        endpoint=endpoint,
        model=body["model"],
        max_tokens=body["max_tokens"] if endpoint in MESSAGES else 0,
        stream=body.get("stream", False),
        body=body,
        size=len(raw),
        text_bytes=text_bytes,
        betas=betas(request),
        found=found,
        labels=said_labels(request.headers),
        fixed_labels=request.fixed_labels,
    )


def header_uses(request: Request) -> list[FeatureUse]:
    """Return the features that a request asks for in its headers."""
    return [FeatureUse(feature, name, request.header(name)[0]) for name, feature in HEADER_FEATURES.items() if request.header(name)]


def betas(request: Request) -> tuple[str, ...]:
    """Return the values of `anthropic-beta`, from one header or several."""
    return tuple(beta for value in request.header("anthropic-beta") for beta in (part.strip() for part in value.split(",")) if beta)


def is_fast(body: Mapping[str, Any]) -> bool:
    """Return whether a request, or one of its fallbacks, asks for fast mode."""
    return body.get("speed") not in (None, "standard")


def edited(endpoint: str, request: Request, changes: Mapping[str, Any]) -> tuple[Request, ParsedRequest | Refusal]:
    """Replace some top-level fields; return the new request and its parse, so that the judged bytes are still the sent ones."""
    body = json.dumps({**json.loads(request.body), **changes}, ensure_ascii=False, separators=(",", ":")).encode()
    changed = replace(request, body=body)
    return changed, read(endpoint, changed)


def _read_head(endpoint: str, request: Request) -> ParsedRequest | Refusal:
    """Parse method, path and headers. A body that is no message is parsed by the module that knows its shape."""
    path = request.target.partition("?")[0]
    if request.body and endpoint not in ("batches.create", "files.upload"):
        return stated("body", f"{request.method} {path} takes no body; send none")
    model, item = _MODEL_PATH.match(path), _ITEM_PATH.match(path)
    return ParsedRequest(
        endpoint=endpoint,
        model=model[1] if model else "",
        item=item[2] if item else "",
        size=len(request.body),
        betas=betas(request),
        found=RequestScan(uses=header_uses(request)),
        labels=said_labels(request.headers),
        fixed_labels=request.fixed_labels,
    )


def _plain_json_headers(request: Request) -> None:
    """Refuse an encoded or re-labelled body: it has as many readings as decoders. Only plain UTF-8 JSON is taken."""
    encodings = [value.strip().casefold() for value in request.header("content-encoding")]
    if any(value not in ("", "identity") for value in encodings):
        raise Unreadable(f"the body is encoded ({', '.join(encodings)}) and cannot be judged as it is; send it without content-encoding")
    types = request.header("content-type")
    if len(types) > 1:
        raise Unreadable("content-type is given twice; send it once, as application/json")
    media_type, _, parameters = (types[0] if types else "application/json").casefold().partition(";")
    if media_type.strip() != "application/json" or parameters.replace(" ", "").replace('"', "") not in ("", "charset=utf-8"):
        raise Unreadable(f"content-type is {types[0][:80]!r}; send application/json in UTF-8")


def _json_object(raw: bytes) -> dict[str, Any]:
    if (values := value_count(raw)) > VALUES_MAX:
        limits = f"the body holds {values:,} JSON values, the gateway reads {VALUES_MAX:,}"
        raise Unreadable(f"{limits}; put data into the prompt as text, or send several requests")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise Unreadable("the body begins with a byte order mark; send plain UTF-8 without one")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"the body is not UTF-8 at byte {error.start}; send JSON in UTF-8") from None
    try:
        body = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"the body is not JSON: {error.msg} at character {error.pos}; send one JSON object") from None
    if not isinstance(body, dict):
        raise Unreadable("the body is not a JSON object; send one, with model, max_tokens and messages")
    return body


def value_count(raw: bytes) -> int:
    """Count the values in a JSON text before anything is made of them, 0 where they are certainly fewer than VALUES_MAX.

    Never fewer than a parser makes before it stops.
    Without escapes each quote begins or ends a string, and only outside of strings does a mark begin another value.
    """
    if len(raw) <= VALUES_MAX or sum(map(raw.count, _VALUE_MARKS)) < VALUES_MAX:
        return 0
    marks_alone = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_MARKS)
    if (strings := marks_alone.count(b'"') // 2) > 2 * VALUES_MAX:  # each is a value or the key of one
        return (strings + 1) // 2
    return len(b"".join(marks_alone.split(b'"')[::2]))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise Unreadable(f"the key {twice[:80]!r} is given twice in one object; parsers disagree on which one counts, send it once")
    return unique


def _constant(name: str) -> Never:
    raise Unreadable(f"{name} is not JSON; send a number, a string or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
"""Made once: `json.loads` makes one for each text."""


def _readable_fields(endpoint: str, body: dict[str, Any], found: RequestScan) -> None:
    """Check the types of the fields that everything else rests on, and that no other key looks like one of them."""
    for name in body:
        if name not in UNTYPED[""] and (known := _taken_for(name)) is not None:
            raise Unreadable(f"the key {name[:80]!r} can be taken for {known!r}; spell it exactly so")
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= MODEL_CHARACTERS_MAX:
        raise Unreadable(f"model must be one non-empty string of at most {MODEL_CHARACTERS_MAX} characters, like claude-haiku-4-5")
    if not isinstance(body.get("messages"), list):
        raise Unreadable("messages must be a list")
    if not isinstance(body.get("tools", []), list):
        raise Unreadable("tools must be a list")
    if not isinstance(body.get("stream", False), bool):
        raise Unreadable("stream must be true or false")
    if endpoint in MESSAGES:
        _whole_number("max_tokens", body.get("max_tokens"))
    for where, other in found.models:
        if not isinstance(other, str) or not 0 < len(other) <= MODEL_CHARACTERS_MAX:
            raise Unreadable(f"{where} must be one non-empty string of at most {MODEL_CHARACTERS_MAX} characters")
    few_files(len(found.files))


def few_files(named: int) -> None:
    """Raise Unreadable where one body names more files than the gateway looks up."""
    if named > FILES_MAX:
        raise Unreadable(f"the body names {named:,} files at the provider, the gateway looks up {FILES_MAX:,}; send several requests")


def _taken_for(name: str) -> str | None:
    """Return the request field that a key may be taken for. NFKC makes no name of plain letters shorter: a long key is none."""
    name = name.strip()
    if len(name) > _KNOWN_FIELD_CHARACTERS_MAX:
        return None
    return _KNOWN_FIELDS.get(unicodedata.normalize("NFKC", name).strip().casefold())


def _whole_number(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value <= MAX_TOKENS_MAX:  # bool is an int to Python, not to the API
        what = "is missing: it must be" if value is None else "must be"
        raise Unreadable(f"{name} {what} a whole number from 0 to {MAX_TOKENS_MAX:,}")


def _text_bytes(raw: bytes, body: dict[str, Any], found: RequestScan) -> int:
    """Return a bound of a prompt's bytes: as sent or after NFKC, whichever is more, without base64 of images and PDFs.

    A byte-level tokenizer makes no more tokens than bytes; one that applies NFKC first (Anthropic's published one of 2023 did)
    sees more of them for a few characters: U+FDFA has 3 bytes, or 6 as `\\ufdfa`, and becomes 33.
    """
    text = raw
    if b"\\" in raw and b"\\u" in raw:  # one byte is found thirty times as fast as two
        try:
            text = json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Unreadable("the body holds half of a surrogate pair; send whole characters") from None
    expanded_bytes = sum(times * definition_bytes(tool) for tool, times in found.expanded())
    return max(len(raw), len(text) + nfkc_growth(text)) - found.encoded_bytes + expanded_bytes


def definition_bytes(tool: Mapping[str, Any]) -> int:
    """Return a bound, as `text_bytes`, of what an expanded tool definition adds to a prompt."""
    text = json.dumps(tool, ensure_ascii=False).encode(errors="replace")  # half a surrogate pair has been refused, or is a question mark
    return len(text) + nfkc_growth(text)
