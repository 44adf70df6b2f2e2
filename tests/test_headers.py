"""Header lookups: quicker, and the same as mitmproxy's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy import http

from gateway_addon.headers import Headers

NAMES = st.sampled_from([b"a", b"A", b"content-length", b"Content-Length", "h\u00e9".encode(), b"\xff"])
FIELDS = st.lists(st.tuples(NAMES, st.one_of(st.binary(max_size=4), st.sampled_from([b"", b"1", "\u20ac".encode()]))), max_size=5)


@given(FIELDS, st.one_of(NAMES, NAMES.map(lambda name: name.decode("utf-8", "surrogateescape"))))
def test_a_lookup_answers_as_mitmproxys_own(fields, name):
    ours, theirs = Headers(fields), http.Headers(fields)
    assert ours.get_all(name) == theirs.get_all(name)
    assert ours.get(name, "none") == theirs.get(name, "none")
    assert (name in ours) is (name in theirs)
    assert list(ours.items()) == list(theirs.items())
    assert bytes(ours) == bytes(theirs)


@given(FIELDS, NAMES, st.one_of(st.binary(max_size=4), st.text(max_size=4)))
def test_a_field_is_set_as_mitmproxys_own_sets_it(fields, name, value):
    ours, theirs = Headers.of(tuple(fields)), http.Headers(fields)
    ours[name] = value
    theirs[name] = value
    assert ours.fields == theirs.fields


@pytest.mark.parametrize("change", [lambda h: h.__setitem__("a", "2"), lambda h: h.pop("a", None), lambda h: h.add("A", "3"), lambda h: h.set_all("a", ["4"])])
def test_a_change_is_seen_by_the_next_lookup(change):
    ours, theirs = Headers([(b"a", b"1"), (b"A", b"9")]), http.Headers([(b"a", b"1"), (b"A", b"9")])
    change(ours)
    change(theirs)
    assert ours.get_all("a") == theirs.get_all("a")
    assert ours.copy() == theirs.copy()
