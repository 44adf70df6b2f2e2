"""Test what the console lists of calls, on both engines."""

from contextlib import closing
from dataclasses import replace

import pytest
from ledgers import CALL, ENGINES, NOON, new_ledger, writing

from gateway_addon.ledger import connect, reservations
from gateway_addon.ledger.reports import call_detail


@pytest.mark.parametrize("engine", ENGINES)
def test_a_refused_probe_for_one_token_is_not_notable(engine, tmp_path):
    """Claude Code sends one at its start, for the headers; a refusal of it keeps its row, and nobody needs to look at it."""
    path = new_ledger(tmp_path, engine)
    with closing(writing(path)) as db:
        for max_tokens in (1, 2, None):
            reservations.refused(db, "me", replace(CALL, max_tokens=max_tokens), "model", now=NOON)
    with connect.reading(path) as db:
        [found] = call_detail.refused_lately(db, since=NOON - 60)
        assert db.execute("SELECT count(*) FROM calls").fetchone()[0] == 3
    assert (found.app, found.code, found.calls) == (CALL.app, "model", 2)
