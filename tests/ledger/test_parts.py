"""Test the parts of an app: which of them a call counts in, and the names of their scopes."""

import pytest

from gateway_addon.ledger import NewCall, part_scope


@pytest.mark.parametrize(
    ("part", "scope"),
    [
        (("session", "3f2a"), "app:coder session:3f2a"),
        (("label.client", "acme"), "app:coder label.client:acme"),
        (("user", "a b:c"), "app:coder user:a b:c"),
    ],
)
def test_a_part_has_a_scope_within_its_app(part, scope):
    assert part_scope("coder", part) == scope


def test_a_call_belongs_to_the_parts_that_it_names():
    whole = NewCall("coder", None, 7, model_asked="fast", model="claude-haiku-4-5", session_id="3f2a", agent_id="b1")
    assert whole.parts == (("session", "3f2a"), ("agent", "b1"), ("model", "claude-haiku-4-5"), ("token", "7"))
    assert NewCall("coder", None, 7, session_id="").parts == (("token", "7"),)
