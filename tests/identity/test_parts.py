"""Test what a request says of its session, agents and user: the forms of real clients, bounded and printable."""

import json

import pytest

from gateway_addon.identity.parts import Parts, parts_of
from gateway_addon.names import NAME_CHARS_MAX

SESSION, DEVICE = "11111111-1111-4111-8111-111111111111", "08ec62c018812c2446c1523cb5bbb5fc42425bea38a9621207f2ce99d1453a65"
NOW = json.dumps({"device_id": DEVICE, "account_uuid": "", "session_id": SESSION}, separators=(",", ":"))
BEFORE = f"user_{DEVICE}_account__session_{SESSION}"


@pytest.mark.parametrize(
    ("headers", "user_id", "parts"),
    [
        ({}, None, Parts()),
        ({}, "u-17", Parts(user="u-17")),
        ({}, "  ", Parts()),
        ({}, 17, Parts()),
        ({}, NOW, Parts(SESSION, user=DEVICE)),
        ({}, BEFORE, Parts(SESSION, user=DEVICE)),
        ({"session": "s1"}, NOW, Parts("s1", user=DEVICE)),
        ({"session": "s1", "agent": "a1"}, None, Parts("s1", "a1")),
        ({"session": "s1", "agent": "a2", "parent-agent": "a1"}, None, Parts("s1", "a2", "a1")),
        ({}, '{"tenant": 4}', Parts(user='{"tenant": 4}')),
        ({}, '{"device_id": 4, "session_id": "s"}', Parts(user='{"device_id": 4, "session_id": "s"}')),
        ({}, '{"device_id": "d", "session_id": ["s"]}', Parts(user="d")),
        ({}, '{"device_id"', Parts(user='{"device_id"')),
    ],
)
def test_the_parts_of_a_request(headers, user_id, parts):
    assert parts_of([(f"x-claude-code-{name}-id", value) for name, value in headers.items()], user_id) == parts


@pytest.mark.parametrize("user_id", ["x" * 10_000, "{" + '"a":' * 3_000, '{"device_id": "' + "\x1b" * 1000 + '"}', "a\nb\x00\ud800"])
def test_a_user_is_bounded_and_printable(user_id):
    found = parts_of([("x-claude-code-session-id", user_id)], user_id)
    for text in (found.user, found.session):
        assert text is not None
        assert len(text) <= NAME_CHARS_MAX
        assert text.isprintable()
