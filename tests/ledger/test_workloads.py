"""Workloads in the ledger: one token row each, sessions that end, revocations that hold for both; on both engines."""

from functools import partial

import pytest
from ledgers import NOON, Steps, new_ledger, rows

from gateway_addon.ledger import NewCall, Reserved, admin, connect, reservations, state, workloads

NIGHTLY = ("reports", "https://issuer.test", "repo:o/r", "w1")


def opened(db, session="s1", of=NIGHTLY, now=NOON, life_s=300, rule="r1"):
    return workloads.open_session(db, *of, session=session, rule=rule, expires_at=now + life_s, now=now)


def looked_up(db, digest, now=NOON):
    return state.look_up_token(db, digest, now).token


def test_a_workload_has_one_row_from_its_first_use_on(db, path):
    first = workloads.enter(db, *NIGHTLY, now=NOON)
    assert workloads.enter(db, *NIGHTLY, now=NOON + 9) == first == looked_up(db, "w1")
    assert (first.app, first.label, first.issuer, first.rule, first.expires_at) == ("reports", "repo:o/r", "https://issuer.test", None, None)
    other = workloads.enter(db, "reports", "https://issuer.test", "repo:O/r", "w2", now=NOON)
    assert other.id != first.id
    seen = rows(path, "SELECT who, action, subject, after FROM audit WHERE action = 'workload first seen' ORDER BY id")
    assert [row[:3] for row in seen] == [("gateway", "workload first seen", "app:reports")] * 2
    assert '"subject": "repo:o/r"' in seen[0][3]


def test_a_session_is_its_workload_until_it_ends(db):
    token = opened(db)
    found = looked_up(db, "s1", NOON + 299)
    assert (found.id, found.app, found.rule, found.expires_at) == (token.id, "reports", "r1", NOON + 300)
    assert (found.refusal(NOON + 299), found.refusal(NOON + 300)) == (None, "token_expired")
    assert isinstance(reservations.reserve(db, "me", NewCall("reports", None, found.id), 10, [], now=NOON + 299), Reserved)
    assert looked_up(db, "w1", NOON + 999).refusal(NOON + 999) is None, "the workload itself does not end"


def test_a_call_in_a_session_is_booked_after_its_end(db):
    """A stream that outlives its session is settled like any other."""
    token = opened(db)
    call = reservations.reserve(db, "me", NewCall("reports", None, token.id), 10, [], now=NOON)
    assert reservations.extend(db, call.call_id, 5, [], now=NOON + 999)


def test_revoking_a_workload_ends_its_sessions(db):
    token = opened(db)
    admin.revoke_tokens(db, "reports", token_id=token.id, who="ann", now=NOON + 1)
    assert looked_up(db, "s1", NOON + 1).refusal(NOON + 1) == "token_revoked"
    assert opened(db, "s2", now=NOON + 2).refusal(NOON + 2) == "token_revoked"
    assert looked_up(db, "s2") is None, "none is opened in the name of a revoked one"
    denied = reservations.reserve(db, "me", NewCall("reports", None, token.id), 10, [], now=NOON + 3)
    assert denied.reason == "token_revoked"
    workloads.restore(db, "reports", token.id, who="ann", why="it was the other", now=NOON + 4)
    assert looked_up(db, "s1", NOON + 5).refusal(NOON + 5) is None


def test_a_workload_is_barred_before_it_was_ever_seen(db, path):
    barred = workloads.bar(db, *NIGHTLY, who="ann", why="leaked", now=NOON)
    assert barred.refusal(NOON) == "token_revoked"
    assert workloads.bar(db, *NIGHTLY, who="ann", now=NOON) is None, "twice is once"
    assert opened(db, now=NOON + 1).id == barred.id
    assert looked_up(db, "s1") is None
    assert [each.id for each in workloads.of_subject(db, "reports", "repo:o/r")] == [barred.id]
    assert workloads.of_subject(db, "other", "repo:o/r") == []
    assert rows(path, "SELECT who, action, why FROM audit ORDER BY id")[1:] == [("ann", "workload first seen", ""), ("ann", "token revoke", "leaked")]


def test_rotating_a_token_leaves_workloads_in(db):
    token = opened(db)
    admin.rotate_token(db, "reports", "d2", who="ann", now=NOON + 1)
    assert looked_up(db, "s1", NOON + 2).refusal(NOON + 2) is None
    assert [each.id for each in admin.tokens(db) if each.refusal(NOON + 2) is None] == [token.id, token.id + 1]
    admin.revoke_tokens(db, "reports", who="ann", now=NOON + 3)
    assert looked_up(db, "s1", NOON + 3).refusal(NOON + 3) == "token_revoked", "revoking all revokes all"


def test_only_a_revoked_workload_is_let_in_again(db):
    token = opened(db)
    for number, said in ((token.id, "is not revoked"), (1, "has no workload 1"), (99, "has no workload 99")):
        with pytest.raises(ValueError, match=said):
            workloads.restore(db, "reports", number, who="ann", now=NOON)
    admin.revoke_tokens(db, "reports", who="ann", now=NOON)
    with pytest.raises(ValueError, match="has no workload 1"):
        workloads.restore(db, "reports", 1, who="ann", now=NOON)


def test_ended_sessions_are_swept_by_new_ones(db, path):
    """However many jobs a day has, the table holds those of the last hours; what has just ended is told so."""
    for number in range(250):
        opened(db, f"old{number}", now=NOON, life_s=300)
    for number in range(3):
        opened(db, f"new{number}", now=NOON + 300 + workloads.KEPT_S + 1)
        left = rows(path, "SELECT count(*) FROM sessions WHERE digest LIKE 'old%'")[0][0]
        assert left == max(0, 250 - (number + 1) * workloads.SWEPT_AT_ONCE)
    assert rows(path, "SELECT count(*) FROM tokens WHERE issuer IS NOT NULL") == [(1,)]


def test_a_look_up_costs_the_same_whatever_sessions_there_are(tmp_path):
    path = new_ledger(tmp_path)
    with connect.changing(path) as db:
        opened(db, "s0")
        steps = Steps(db)
        few = [steps.of(partial(state.look_up_token, db, digest, NOON)) for digest in ("d1", "s0", "w1")]
        for number in range(2000):
            opened(db, f"s{number + 1:05}", life_s=10**6)
        many = [steps.of(partial(state.look_up_token, db, digest, NOON)) for digest in ("d1", "s0", "w1")]
        assert all(more <= less + 1 for more, less in zip(many, few, strict=True)), "counted in tens, which begin anywhere"
