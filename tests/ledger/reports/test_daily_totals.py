"""Reports of closed days are kept, and are what the calls say whatever happens to them afterwards."""

from contextlib import closing
from dataclasses import replace

import pytest
from ledgers import CALL, ENGINES, NOON, copied, new_ledger, rows, spend, writing

from gateway_addon.ledger import Settlement, admin, connect, reservations
from gateway_addon.ledger.maintenance import prune
from gateway_addon.ledger.reports import daily_totals, spending
from gateway_addon.ledger.reports.call_sums import EVERY, Only
from gateway_addon.ledger.reports.day_reader import DayReader

DAY_S = 86_400
SINCE, UNTIL = NOON - 5 * DAY_S, NOON
GROUPINGS = [("app", None), ("model", "token"), ("served", None), ("day", "app"), ("team", "month"), ("session", "day")]
ONLY = [EVERY, Only(app="reports", team="batch", model="claude-sonnet-5")]


EDGES = (SINCE, SINCE + DAY_S / 2, UNTIL - DAY_S / 2, UNTIL)


@pytest.fixture(scope="module", params=ENGINES)
def filled(tmp_path_factory, request):
    found = new_ledger(tmp_path_factory.mktemp("filled"), request.param)
    with connect.changing(found) as db:
        for number in range(60):
            call = replace(CALL, model_asked=("claude-haiku-4-5", "claude-sonnet-5")[number % 2])
            spend(db, NOON - number * DAY_S / 4, 10 + number, call)
            reservations.refused(db, "me", call, ("rate", "cap_spent")[number % 2], now=NOON - number * DAY_S / 4)
            reservations.failed_authentication(db, "token_unknown", now=NOON - number * DAY_S / 4)
    return found


@pytest.fixture
def path(tmp_path, filled):
    return copied(filled, tmp_path)


def told(path):
    with connect.reading(path) as db:
        return [spending.report(db, by, since=SINCE, until=UNTIL, then=then, only=only) for by, then in GROUPINGS for only in ONLY]


def keep(path, now=NOON):
    daily_totals.keep(path, since=SINCE, until=UNTIL, now=now)


def kept(path):
    return rows(path, "SELECT count(*) FROM kept_days WHERE ready = 1")[0][0]


def seen_by(reader, path):
    with connect.reading(path) as db:
        return [(day.start, sorted(day.lines), sorted(day.billed), sorted(day.noise)) for day in reader.between(db, SINCE - 10 * DAY_S, UNTIL - DAY_S / 2, NOON)]


def of_calls(path):
    with closing(writing(path)) as db:
        db.execute("DELETE FROM kept_days")
    return told(path)


def test_a_report_of_kept_days_reads_no_call_and_is_the_same(path):
    before = told(path)
    keep(path)
    assert kept(path) == 9, "the whole days of the period and of the one before"
    assert told(path) == before
    with closing(writing(path)) as db:
        db.execute("UPDATE kept_days SET sums = $1", ('[[[["x","y",1,"m","m","","",false],1,1,0,0,0,1000]],[],[],[]]',))
    [(edges_nano,)] = rows(path, "SELECT sum(spent_nano) FROM entries JOIN calls ON calls.id = call_id WHERE started_at >= $1 AND (started_at < $2 OR started_at >= $3) AND started_at < $4", *EDGES)
    assert told(path)[0].spent_nano == edges_nano + 4 * 1000


@pytest.mark.parametrize("change", ["a call", "a refusal", "a correction", "a call without a token", "a zone", "a team", "a prune"])
def test_what_changes_a_day_strikes_it_off(path, change):
    """Also of a reader who has seen it before."""
    reader = DayReader()
    seen_by(reader, path)
    keep(path)
    seen_by(reader, path)
    with connect.changing(path) as db:
        match change:
            case "a call":
                spend(db, NOON - 2 * DAY_S)
            case "a refusal":
                reservations.refused(db, "me", CALL, "rate", now=NOON - 2 * DAY_S)
            case "a correction":
                admin.adjust(db, 9, -3, who="test", why="x", now=NOON)
            case "a call without a token":
                reservations.failed_authentication(db, "token_unknown", now=NOON - 2 * DAY_S + 60)
            case "a zone":
                admin.align(db, "Asia/Tokyo", {}, who="test", now=NOON)
            case "a team":
                admin.align(db, "UTC", {"reports": "other"}, who="test", now=NOON)
            case "a prune":
                day = prune.next_day(db, NOON - 2.5 * DAY_S, NOON)
                prune.carry(db, day.groups, now=NOON)
    struck = kept(path)
    seen = told(path)
    assert seen_by(reader, path) == seen_by(DayReader(), path)
    keep(path)
    assert struck == (0 if change in ("a zone", "a team") else 8)
    assert kept(path) == 9
    assert told(path) == seen == of_calls(path)


def test_a_day_is_kept_only_when_closed_for_an_hour_and_settled(path):
    """A day with an open call is not kept."""
    with connect.changing(path) as db:
        open_id = reservations.reserve(db, "me", CALL, 100, [], now=NOON - 3 * DAY_S).call_id
    keep(path)
    assert kept(path) == 6
    with connect.changing(path) as db:
        reservations.settle(db, open_id, Settlement(7), now=NOON)
    keep(path, now=NOON - DAY_S / 2 + 3599)
    assert kept(path) == 8
    keep(path, now=NOON - DAY_S / 2 + 3600)
    assert kept(path) == 9
    assert told(path) == of_calls(path)


def test_a_day_that_changes_while_it_is_summed_is_not_kept(path, monkeypatch):
    def with_a_call_between(db, span, of_calls=daily_totals.of_calls):
        day = of_calls(db, span)
        if span.start < NOON - 2 * DAY_S < span.end:
            with connect.changing(path) as other:
                spend(other, NOON - 2 * DAY_S)
        return day

    with monkeypatch.context() as patched:
        patched.setattr(daily_totals, "of_calls", with_a_call_between)
        keep(path)
    assert kept(path) == 8
    assert told(path) == of_calls(path)


def claimed(path, now=NOON, **how):
    with connect.reading(path) as db:
        wanted = list(daily_totals.missing(db, 0, NOON, NOON))
    with connect.changing(path) as db:
        return daily_totals.claim(db, wanted, now=now, **how)


def summed(path, spans):
    with connect.reading(path) as db:
        return [(span, daily_totals.of_calls(db, span)) for span in spans]


def put(path, found, claimed_at):
    with connect.changing(path) as db:
        return [daily_totals.put(db, span, day, claimed_at=claimed_at) for span, day in found]


def test_a_replaced_claim_keeps_nothing(path):
    """Not even where the day changed in between."""
    stale = summed(path, claimed(path))
    with connect.changing(path) as db:
        spend(db, NOON - 2 * DAY_S)
    fresh = summed(path, claimed(path, NOON + 1))
    assert put(path, stale, NOON) == [False] * len(stale)
    assert put(path, fresh, NOON + 1) == [True] * len(fresh)
    assert told(path) == of_calls(path)


@pytest.mark.parametrize("change", ["a zone", "an open call"])
def test_what_is_no_closed_day_any_more_is_not_claimed(path, change):
    with connect.reading(path) as db:
        wanted = list(daily_totals.missing(db, 0, NOON, NOON))
    with connect.changing(path) as db:
        if change == "a zone":
            admin.align(db, "Asia/Tokyo", {}, who="test", now=NOON)
        else:
            reservations.reserve(db, "me", CALL, 100, [], now=NOON - 20 * DAY_S)
        assert daily_totals.claim(db, wanted, now=NOON) == []


def test_a_claim_alone_lets_others_finish_unless_they_are_gone(path):
    days = claimed(path)
    assert claimed(path, NOON + daily_totals.TURN_S - 1, alone=True) == []
    assert claimed(path, NOON + daily_totals.TURN_S + 1, alone=True) == days


def test_a_day_of_too_many_lines_is_kept_without_its_tokens(path, monkeypatch):
    """Then without the models as asked, which clients may invent; who wants them told apart has them from the calls."""
    for most, folded in ((1, ("token_id", "asked")), (4, ("token_id",))):
        monkeypatch.setattr(daily_totals, "LINES_MAX", most)
        with connect.changing(path) as db:
            token = admin.issue_token(db, "reports", f"d{most + 1}", who="test", now=NOON)
            spend(db, NOON - 2 * DAY_S, call=replace(CALL, token_id=token.id))
        before = of_calls(path)
        keep(path)
        with connect.reading(path) as db:
            [day] = daily_totals.kept(db, NOON - 2.5 * DAY_S, NOON - 1.5 * DAY_S)
            told_by_reader = [line.key.asked for line in DayReader().between(db, day.start, day.end, NOON)[0].lines]
        assert (day.folded, {line.key.token_id for line in day.lines}) == (folded, {0})
        assert "(many)" not in told_by_reader
        assert told(path) == before
