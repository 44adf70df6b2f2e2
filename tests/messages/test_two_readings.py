"""No request has two readings: whatever other parsers make of an admitted body's bytes, they see the model and the limits that were judged.

Bodies are put together from pieces on which parsers are known to disagree: keys given twice, escaped or in other letters, odd numbers,
broken surrogates, separators that some take, byte order marks, other encodings, text before and after. An upstream is played by readers
that share nothing with the gateway's but the standard library's scanner.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from gateway import gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import rows
from rawhttp import send

from gateway_addon.messages.request import ParsedRequest, Request, read
from gateway_addon.simulator import Simulator

# Each reader: bytes -> what it takes for the body, or an error where it takes none.


def first_wins(raw: bytes) -> Any:
    return json.loads(raw, object_pairs_hook=lambda pairs: dict(reversed(pairs)))


def last_wins_of_any_encoding(raw: bytes) -> Any:
    return json.loads(raw)  # of bytes it guesses UTF-8, 16 or 32, with or without a byte order mark; NaN is a number to it


def letters_do_not_matter(raw: bytes) -> Any:
    return json.loads(raw, object_pairs_hook=lambda pairs: {key.strip().casefold(): value for key, value in pairs})


def what_follows_does_not_matter(raw: bytes) -> Any:
    return json.JSONDecoder(strict=False).raw_decode(raw.decode("utf-8-sig", "replace").strip("\0 \t\r\n\x1a"))[0]


def broken_characters_are_replaced(raw: bytes) -> Any:
    return json.loads(raw.decode("utf-8", "replace").replace("\0", ""), strict=False)


def numbers_are_floats(raw: bytes) -> Any:
    return json.loads(raw, parse_int=float)


def what_is_compressed_is_opened(raw: bytes) -> Any:
    return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else zlib.decompress(raw))


def comments_are_left_out(raw: bytes) -> Any:
    return json.loads(raw.decode().replace("/*x*/", "").replace("//x\n", "").replace(",,", ",").replace(",}", "}"))


READERS: tuple[Callable[[bytes], Any], ...] = (
    first_wins,
    last_wins_of_any_encoding,
    letters_do_not_matter,
    what_follows_does_not_matter,
    broken_characters_are_replaced,
    numbers_are_floats,
    what_is_compressed_is_opened,
    comments_are_left_out,
)


def disagreements(raw: bytes, found: ParsedRequest) -> list[str]:
    """The readers that see another model, limit or kind of answer in the bytes than was judged."""
    judged = (found.model, found.max_tokens, found.stream)
    wrong = []
    for reader in READERS:
        try:
            seen = reader(raw)
        except (ValueError, RecursionError, OSError, EOFError, zlib.error):
            continue  # to this reader it is no request
        if not isinstance(seen, dict) or (seen.get("model"), seen.get("max_tokens"), seen.get("stream", False)) != judged:
            wrong.append(reader.__name__)
    return wrong


SMALL, DEAR = '"claude-haiku-4-5"', '"claude-opus-5-5"'
MODELS = (SMALL, DEAR, '"claude\\u002dhaiku-4-5"', '"claude-opus-5-5\\u0000"', '"\\ud83d\\ude00"', '"\\ud83d"', '""', "null", "[]", '"claude-haiku-4-5')
LIMITS = ("16", "17", "16.0", "1e1", "1.6e1", "+16", "016", "0x10", "-0", "-1", "1_6", "10000000", "1e400", "9" * 30, "true", "null", '"16"', "[16]", "NaN")
KEYS = {
    "model": ('"model"', '"mod\\u0065l"', '"Model"', '"MODEL"', '" model"', '"model\\u0000"', '"ｍodel"', "'model'", "model", '"mo\\/del"'),
    "max_tokens": ('"max_tokens"', '"max\\u005ftokens"', '"Max_Tokens"', '"max_tokens "', '"maxTokens"', '"max_tokenſ"', "max_tokens"),
    "stream": ('"stream"', '"STREAM"', '"str\\u0065am"', '"ſtream"'),
    "other": ('"metadata"', '"x"', '""', '"__proto__"', '"constructor"', '"\\ud800"', '"system"'),
}
VALUES = {"model": MODELS, "max_tokens": LIMITS, "stream": ("true", "false", "null", "1", '"true"'), "other": (*MODELS, *LIMITS, '{"model":' + DEAR + "}", '"\ufeff"')}
PLAIN = (f'"model":{SMALL}', '"max_tokens":16', '"messages":[{"role":"user","content":"é"}]')
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": lambda text: text.encode("utf-8", "replace"),
    "utf-8 with broken halves": lambda text: text.encode("utf-8", "surrogatepass"),
    "with a mark": lambda text: text.encode("utf-8-sig", "replace"),
    "utf-16": lambda text: text.encode("utf-16", "replace"),
    "utf-16 unmarked": lambda text: text.encode("utf-16-le", "replace"),
    "utf-32": lambda text: text.encode("utf-32", "replace"),
    "latin-1": lambda text: text.encode("latin-1", "replace"),
    "gzip": lambda text: gzip.compress(text.encode("utf-8", "replace")),
    "zlib": lambda text: zlib.compress(text.encode("utf-8", "replace")),
}


TRICKS: dict[str, tuple[str, ...]] = {
    "separator": (",,", ";", "/*x*/,", ",\0", ",\ufeff", ",\xa0", ",\r\n", " , "),
    "before": ("\ufeff", "\0", "[", "//x\n", "{}", "\x1a", "\n"),
    "after": ("}", "\0", "\x1a", "//x\n", '{"model":' + DEAR + "}", ",", "\n"),
    "colon": (": ", ":\n", "\xa0:", "\u2028:", "\ufeff:", "\0:", "/*x*/:"),
    "end": (",}", " }", ",,}", "]"),
    "encoding": tuple(ENCODINGS),
    "kept": ("0", "1", "01"),
}
USUAL = {"separator": ",", "before": "", "after": "", "colon": ":", "end": "}", "encoding": "utf-8", "kept": ""}


@st.composite
def members(draw: st.DrawFn, colon: str) -> str:
    """A key and a value that may disagree with those of the plain body: half of the keys are spelled as they should be."""
    name = draw(st.sampled_from(tuple(KEYS)))
    key = KEYS[name][0] if draw(st.booleans()) else draw(st.sampled_from(KEYS[name]))
    return f"{key}{colon}{draw(st.sampled_from(VALUES[name]))}"


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A plain body with up to two more members and up to one other trick: with more, hardly any would be admitted."""
    parts = dict(USUAL)
    if trick := draw(st.sampled_from(("", "", "", *TRICKS))):
        parts[trick] = draw(st.sampled_from(TRICKS[trick]))
    kept = [member for index, member in enumerate(PLAIN) if str(index) not in parts["kept"]]
    everything = draw(st.permutations([*kept, *draw(st.lists(members(parts["colon"]), max_size=2))]))
    return ENCODINGS[parts["encoding"]](parts["before"] + "{" + parts["separator"].join(everything) + parts["end"] + parts["after"])


@pytest.mark.parametrize("examples", [300, pytest.param(50_000, marks=pytest.mark.soak)])
def test_nothing_is_admitted_that_two_parsers_read_differently(examples: int):
    judged: Counter[bool] = Counter()

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(bodies())
    def never(raw: bytes) -> None:
        found = read("messages", Request("POST", "/v1/messages", (), raw))
        judged[isinstance(found, ParsedRequest)] += 1
        assert not isinstance(found, ParsedRequest) or disagreements(raw, found) == [], raw

    never()
    assert judged[True] > examples // 20, "enough of them are admitted for the claim to mean something"


def test_the_readers_see_what_a_careless_gateway_lets_through():
    """Each kind of trick, read as a gateway would that takes the last of two keys and decodes what it can: some other reader differs."""
    careless = [
        b'{"model":"claude-opus-5-5","model":"claude-haiku-4-5","max_tokens":16}',
        b'{"model":"claude-haiku-4-5","MODEL":"claude-opus-5-5","max_tokens":16}',
        b'{"model":"claude-haiku-4-5","max_tokens":16,"Max_Tokens":32000}',
        b'{"model":"claude-haiku-4-5","mod\\u0065l":"claude-opus-5-5","max_tokens":16}',
        b'{"model":"claude-haiku-4-5","max_tokens":16,"stream":false,"stream":true}',
        b'{"model":"claude-haiku-4-5\\u0000","model":"claude-haiku-4-5","max_tokens":16}',
    ]
    for raw in careless:
        seen = json.loads(raw)
        assert disagreements(raw, ParsedRequest("messages", seen["model"], seen["max_tokens"], seen.get("stream", False))), raw


async def test_the_api_gets_through_a_socket_what_the_ledger_has(tmp_path):
    """Model and limits that the API reads are those that the ledger says were asked for."""
    sent: dict[str, bytes] = {}

    @settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @given(bodies())
    def gather(raw: bytes) -> None:
        sent[hashlib.sha256(raw).hexdigest()] = raw

    gather()
    app = "models: {allow: [claude-*]}\ncaps: unlimited\nunknown_fields: pass\n"
    async with Simulator() as api, gateway(tmp_path, api, {"app": app}) as gw:
        head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {gw.tokens['app']}\r\nanthropic-version: 2023-06-01\r\nconnection: close\r\n"
        for number, raw in enumerate(sent.values()):
            if number % 2:
                await send(gw, f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
            else:  # in chunks, cut where it hurts
                parts = [raw[:7], raw[7:8], raw[8:]]
                chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part)
                await send(gw, f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n")
        await gw.quiet()
        received = [sent[row.body_sha256] for row in (await api.settled()).messages()]
    asked = rows(tmp_path / "gateway.db", "SELECT model_asked, max_tokens, stream FROM calls WHERE state != 'refused'")
    for reader in (first_wins, letters_do_not_matter, what_follows_does_not_matter):
        seen = [(body["model"], body["max_tokens"], int(body.get("stream", False))) for body in map(reader, received)]
        assert sorted(seen) == sorted(asked)
    assert len(received) >= 5
