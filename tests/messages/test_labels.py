"""Test how labels are read of a request: from headers, from the path, bounded."""

import pytest

from gateway_addon.messages.labels import LABELS_MAX, PATH_HEADER, SaidLabel, said_labels, split_path
from gateway_addon.names import NAME_CHARS_MAX


@pytest.mark.parametrize(
    ("target", "split"),
    [
        ("/v1/messages", ("", "/v1/messages")),
        ("/l/client=acme/v1/messages?beta=true", ("client=acme", "/v1/messages?beta=true")),
        ("/l/client=acme,branch=a%2Fb/v1/messages", ("client=acme,branch=a%2Fb", "/v1/messages")),
        ("/l/client=acme/", ("client=acme", "/")),
        ("/l/client=/v1/messages", ("", "/l/client=/v1/messages")),
        ("/l/acme/v1/messages", ("", "/l/acme/v1/messages")),
        ("/l/Client=acme/v1/messages", ("", "/l/Client=acme/v1/messages")),
        ("/l/client=acme", ("", "/l/client=acme")),
        ("/l/client=a%zz/v1/messages", ("", "/l/client=a%zz/v1/messages")),
        ("//l/client=acme/v1/messages", ("", "//l/client=acme/v1/messages")),
    ],
)
def test_labels_are_split_off_a_path(target, split):
    assert split_path(target) == split


def test_labels_are_read_of_headers_and_path():
    headers = [("x-gateway-label-client", " acme "), ("x-api-key", "k"), (PATH_HEADER, "branch=a%2Fb,pr=41"), ("x-gateway-label-empty", "")]
    assert said_labels(headers) == (SaidLabel("client", "acme", "header"), SaidLabel("branch", "a/b", "path"), SaidLabel("pr", "41", "path"))


def test_labels_are_few_and_as_short_as_names():
    found = said_labels([(f"x-gateway-label-{number}" + "n" * 1000, "\x1b" * 1000) for number in range(1000)])
    assert len(found) == LABELS_MAX
    assert {len(label.value) for label in found} == {len(label.name) for label in found} == {NAME_CHARS_MAX}
    assert all(label.value.isprintable() for label in found)
