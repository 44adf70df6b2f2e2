"""The ledger beside the provider's reports: the simulated API's own book, read by the admin key, over the wire."""

import asyncio
import json
import os
import pty
import sys
import time
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import anthropic
import httpx2
import pytest
from click.testing import CliRunner, Result
from gateway import gateway
from ledgers import CALL, ENGINES, Part, new_ledger, rows, url
from upstreams import answer, upstream

from gateway_addon.cli import reconcile as command
from gateway_addon.ledger import Ledger, Outcome, Settlement, connect
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.ledger.reports import provider_comparison
from gateway_addon.ledger.reports.provider_comparison import DAY_S, Estimate, Metered
from gateway_addon.operations.reconcile import Counts, Reported, Short, bypassing, compare, corrections, shorts, worth_nano
from gateway_addon.pricing import load
from gateway_addon.simulator import ADMIN_KEY, KEY, Behaviour, Simulator
from gateway_addon.upstreams.usage_report import AdminApi, ReportUnavailable

PRICES = load()
HAIKU = "claude-haiku-4-5"
DAY = (date(2026, 11, 20) - date(1970, 1, 1)).days
LATER = (DAY + 2) * DAY_S
HELLO = {"model": HAIKU, "max_tokens": 40, "messages": [{"role": "user", "content": "Say hello."}]}
ADMIN = "admin_key: {env: SIMULATED_ADMIN_KEY}\n"


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_ADMIN_KEY", ADMIN_KEY)


async def run(folder: Path, *arguments: str) -> Result:
    where = ["--policies", str(folder / "policies"), "--ledger", f"sqlite:///{folder / 'gateway.db'}"]
    return await asyncio.to_thread(CliRunner().invoke, command.reconcile, [*where, "--since", "1d", *arguments])


async def direct_call(api: Simulator, **asked: object) -> None:
    async with anthropic.AsyncAnthropic(base_url=api.url, api_key=KEY, max_retries=0) as client:
        await client.messages.create(**{**HELLO, **asked})


# End to end


async def test_calls_through_the_gateway_agree_to_token_and_cent(tmp_path):
    """Calls through the gateway agree to the token and to the cent."""
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        for _ in range(3):
            await gw.client().messages.create(**HELLO)
        await gw.quiet()
        shown = await run(tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "Agreement: 100.00 %" in shown.output
    assert "Nothing bypassed the gateway" in shown.output


async def test_a_call_that_bypasses_the_gateway_shows_up(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        await gw.client().messages.create(**HELLO)
        await direct_call(api, model="claude-sonnet-5")
        await gw.quiet()
        bypassing = api.book.messages()[-1]
        shown = await run(tmp_path)
        [polled] = rows(tmp_path / "gateway.db", "SELECT count(*) FROM settings WHERE name = 'reports_polled_at'")
    assert (shown.exit_code, polled) == (1, (1,))
    assert "calls that bypass it" in shown.output
    assert f"claude-sonnet-5  {bypassing.usage.output_tokens:,} output tokens" in shown.output
    assert "claude-haiku-4-5  " not in shown.output.partition("calls that bypass it")[2]


async def test_it_says_the_same_to_programs(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        await gw.client().messages.create(**HELLO)
        await direct_call(api)
        await gw.quiet()
        book = api.book.messages()
        said = json.loads((await run(tmp_path, "--json")).stdout)
    assert said["provider_nano"] == sum(row.billed_nano for row in book)
    assert said["gateway_nano"] == book[0].billed_nano
    unseen = {line["kind"]: line["unseen"] for line in said["lines"]}
    assert unseen == {"input_tokens": book[1].usage.input_tokens, "output_tokens": book[1].usage.output_tokens}
    assert 0 < said["agreement_percent"] < 100


async def test_only_reconcile_reads_the_admin_key_and_calls_no_model(tmp_path):
    """Only this command reads the admin key and it calls no model."""
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        await gw.client().messages.create(**HELLO)
        await gw.quiet()
        await run(tmp_path)
        sent = [(row.target.partition("?")[0].rpartition("/v1/")[2], row.header("x-api-key")) for row in api.book.all()]
        with pytest.raises(anthropic.AuthenticationError):
            async with anthropic.AsyncAnthropic(base_url=api.url, api_key=ADMIN_KEY, max_retries=0) as client:
                await client.messages.create(**HELLO)
    assert sent == [
        ("messages", KEY), ("organizations/usage_report/messages", ADMIN_KEY), ("organizations/cost_report", ADMIN_KEY),
    ]  # fmt: skip


async def test_without_an_admin_key_it_says_where_to_name_one(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api):
        shown = await run(tmp_path)
    assert (shown.exit_code, api.book.requests) == (2, 0)
    assert "admin_key: {env: ANTHROPIC_ADMIN_KEY}" in shown.output


@pytest.mark.parametrize("period", [("--since", "2999-01-01"), ("--since", "2026-11-10", "--until", "2026-11-10")])
async def test_a_period_without_a_day_is_a_sentence_and_asks_nobody(tmp_path, period):
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN):
        shown = await run(tmp_path, *period)
    assert (shown.exit_code, "has no day in it" in shown.output, api.book.requests) == (2, True, 0)


async def test_days_before_and_after_the_period_are_left_out(tmp_path):
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        await gw.client().messages.create(**HELLO)
        await gw.quiet()
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        shown = await run(tmp_path, "--since", "7d", "--until", today)
    assert "Neither the provider nor the gateway saw a call in this period." in shown.output


@pytest.mark.parametrize("engine", ENGINES)
async def test_provider_is_asked_once_a_minute_by_all_processes(tmp_path, monkeypatch, engine):
    """The provider is asked once a minute by all processes together."""
    path, slept = new_ledger(tmp_path, engine), []
    clock = [1000.0]
    monkeypatch.setattr(command.time, "time", lambda: clock[0])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    command._take_turn(path, sleep)
    assert slept == []
    clock[0] += 20
    command._take_turn(path, sleep)
    assert sum(slept) == pytest.approx(40)


async def test_cut_streams_estimate_is_corrected_and_audited(tmp_path, monkeypatch):
    """The stream is cut half way; the book knows what was generated, the ledger has booked the whole grant."""
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        await gw.client().messages.create(**HELLO)
        api.behaviour = Behaviour(cut_after_bytes=900)
        with pytest.raises((anthropic.AnthropicError, httpx2.HTTPError)):
            async with gw.client().messages.stream(**{**HELLO, "max_tokens": 4000}) as stream:
                await stream.get_final_message()
        await gw.quiet()
        billed_nano = (await api.settled()).billed_nano
        booked_nano = await gw.spent_nano()
        assert booked_nano > billed_nano, "an upper bound was booked"
        now = time.time()
        assert "not complete yet" in (await run(tmp_path, "--adjust")).output
        monkeypatch.setattr(provider_comparison, "POLL_EVERY_S", 0)
        monkeypatch.setattr(command.time, "time", lambda: now + 2 * DAY_S)
        since = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
        assert "too much (--adjust takes it off)" in (await run(tmp_path, "--since", since)).output
        assert await gw.spent_nano() == booked_nano
        first, second = await run(tmp_path, "--since", since, "--adjust"), await run(tmp_path, "--since", since, "--adjust")
        corrected_nano = await gw.spent_nano()
        with connect.reading(tmp_path / "gateway.db") as db:
            assert invariants.findings(db) == []
    assert billed_nano <= corrected_nano < booked_nano
    assert corrected_nano - billed_nano <= 1, "one model, one tier: exact but for the rounding"
    assert "taken off" in first.output
    assert "taken off" not in second.output
    [(why,)] = rows(tmp_path / "gateway.db", "SELECT why FROM audit WHERE action = 'adjust'")
    assert why.startswith("reconcile: the provider's report leaves at most")


# The comparison


def seen(model: str = HAIKU, day: int = DAY, **counts: int) -> Reported:
    return Reported(day, model, "apikey_1", "standard", "global", Counts(**counts))


def metered(model: str = HAIKU, ended: int = DAY, *, estimated: bool = False, nano: int = 1, **counts: int) -> Metered:
    every = dict.fromkeys(Counts.__slots__, 0) | counts
    return Metered(day=DAY, ended_day=ended, model=model, estimated=estimated, nano=nano, **every)


@pytest.mark.parametrize(
    ("reported", "known", "unseen"),
    [
        ([seen(output_tokens=10)], [metered(output_tokens=10)], 0),
        ([seen(output_tokens=10)], [metered(output_tokens=7)], 3),
        ([seen(output_tokens=10)], [metered(output_tokens=7), metered(output_tokens=3, estimated=True)], 0),
        ([seen(output_tokens=10)], [metered(output_tokens=12)], 0),
        ([seen("claude-haiku-4-5-20251001", output_tokens=10)], [metered(HAIKU, output_tokens=10)], 0),
        ([seen("claude-sonnet-5", output_tokens=10)], [metered(HAIKU, output_tokens=10)], 10),
        ([seen(output_tokens=4), seen(output_tokens=6, day=DAY + 1)], [metered(output_tokens=10, ended=DAY + 1)], 0),
        ([seen(output_tokens=10, day=DAY + 1)], [metered(output_tokens=10, ended=DAY + 1)], 0),
        ([seen(output_tokens=10, day=DAY + 1)], [metered(output_tokens=10)], 10),
    ],
    ids=["agree", "bypass", "an estimate covers it", "the report is late", "a dated id", "another model", "midnight", "next day", "other day"],
)  # fmt: skip
def test_what_the_provider_saw_and_the_gateway_did_not(reported, known, unseen):
    assert sum(line.unseen for line in compare(reported, known, PRICES)) == unseen


def test_what_bypassed_is_worth_its_list_price():
    lines = compare([seen(input_tokens=1_000_000, web_searches=2)], [], PRICES)
    assert worth_nano(lines, PRICES) == 1_000_000_000 + 2 * 10_000_000


@pytest.mark.parametrize(
    ("estimates", "past"),
    [([], 10), ([(50_000, 0, DAY)], 0), ([(49_999, 0, DAY)], 10), ([(50_000, 1, DAY)], 10), ([(50_000, 0, DAY + 1)], 0)],
    ids=["none", "a lost answer may be it", "too little for it", "a metered one is not", "it ended the next day"],
)
def test_tokens_of_answers_that_were_lost_are_no_bypass(estimates, past):
    """Ten output tokens are worth 50,000 nano-dollars."""
    given = [Estimate(1, DAY, ended, HAIKU, spent_nano, metered_nano, 0) for spent_nano, metered_nano, ended in estimates]
    lines = compare([seen(output_tokens=10)], [], PRICES)
    assert sum(line.unseen for line in bypassing(lines, given, PRICES)) == past


@pytest.mark.parametrize(
    ("reported", "left", "found"),
    [
        ([seen(output_tokens=30)], True, [Short(DAY, HAIKU, 10, 1, alone=True)]),
        ([seen(output_tokens=30)], False, []),
        ([seen(output_tokens=20)], True, []),
        ([seen(output_tokens=30, input_tokens=1)], True, [Short(DAY, HAIKU, 10, 1, alone=False)]),
        ([seen("claude-sonnet-5", output_tokens=30)], True, []),
        ([seen(output_tokens=20, input_tokens=1)], True, []),
    ],
    ids=["left", "lost", "all is booked", "input too", "another model", "input alone"],
)
def test_more_output_than_booked_on_a_day_with_left_calls(reported, left, found):
    given = [replace(estimate(100_000, 100_000, 20), left=left)]
    lines = compare(reported, [replace(metered(output_tokens=20), estimated=True)], PRICES)
    assert shorts(bypassing(lines, given, PRICES), given, PRICES) == found


async def test_a_pace_that_is_too_small_is_said(tmp_path):
    """The provider goes on longer than declared after a client left: that is no bypass."""
    hours = Behaviour(overrun=True, output_tokens=30_000, delay_ms=5)
    async with Simulator(behaviour=hours) as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        async with gw.client().messages.stream(**HELLO | {"max_tokens": 32_000}) as stream:
            async for _ in stream:
                break
        await gw.quiet()
        shown = await run(tmp_path)
    assert shown.exit_code == 1
    assert f"output tokens of {HAIKU} more than is booked, on a day with 1 call that broke off: its lag_s or output" in shown.output
    assert "Nothing bypassed the gateway" in shown.output


# Corrections. Haiku 4.5: $1 and $5 for a million tokens, so 1,000 and 5,000 nano-dollars for one.


def estimate(spent_nano: int, metered_nano: int = 0, output_tokens: int = 0, call_id: int = 1, ended: int = DAY) -> Estimate:
    return Estimate(call_id, DAY, ended, HAIKU, spent_nano, metered_nano, output_tokens)


EXACT = metered(input_tokens=100, output_tokens=10)


@pytest.mark.parametrize(
    ("reported", "estimates", "deltas"),
    [
        # 100 in and 10 out are exact; the report leaves 50 in and 20 out: 50 x 1,000 + 20 x 5,000 = 150,000
        ([seen(input_tokens=150, output_tokens=30)], [estimate(400_000)], [-250_000]),
        ([seen(input_tokens=150, output_tokens=30)], [estimate(150_000)], []),
        ([seen(input_tokens=150, output_tokens=30)], [estimate(100_000)], []),
        # nothing is left: all was never spent, but the exactly known input stays (60,000 of it: 560,000 - 100 x 5,000)
        ([seen(input_tokens=160, output_tokens=10)], [estimate(560_000, 560_000, 100)], [-500_000]),
        ([seen(input_tokens=100, output_tokens=10)], [estimate(560_000, 560_000, 100)], [-500_000]),
        # in proportion: 600,000 booked, 150,000 left, three quarters of each go
        ([seen(input_tokens=150, output_tokens=30)], [estimate(400_000), estimate(200_000, call_id=2)], [-300_000, -150_000]),
        # a call that ended the next day may be in that day's report
        ([seen(input_tokens=100, output_tokens=10)], [estimate(400_000, ended=DAY + 1)], []),
        # a bypassing call of a dear model: room for everything
        ([seen(input_tokens=100, output_tokens=10), seen("claude-opus-5", output_tokens=100)], [estimate(400_000)], []),
    ],
)
def test_estimates_come_down_to_what_the_report_leaves_for_them(reported, estimates, deltas):
    found, silent = corrections(reported, [EXACT], estimates, PRICES, now=LATER)
    assert ([delta for each in found for _, delta in each.deltas], silent) == (deltas, [])


@pytest.mark.parametrize(
    ("reported", "known", "now", "said"),
    [
        ([seen(input_tokens=100, output_tokens=10)], [EXACT], (DAY + 1) * DAY_S + 60, "not complete yet"),
        ([seen(input_tokens=99, output_tokens=10)], [EXACT], LATER, "not evidence"),
        ([], [EXACT], LATER, "not evidence"),
        ([seen(input_tokens=100, output_tokens=10)], [], LATER, "not evidence"),
        ([seen(input_tokens=100, output_tokens=10), seen("claude-new-9", output_tokens=1)], [EXACT], LATER, "without a price"),
    ],
    ids=["still filling", "lacks a token", "another key's report", "nothing exact", "no price"],
)
def test_a_report_that_proves_nothing_corrects_nothing(reported, known, now, said):
    found, [silent] = corrections(reported, known, [estimate(400_000)], PRICES, now=now)
    assert found == []
    assert said in silent


def test_dearer_tiers_are_taken_where_the_report_cannot_tell():
    """A prompt beyond a model's long-prompt limit costs more for every token: the bound takes that price."""
    model = "claude-haiku-5-5"
    known = [metered(model, input_tokens=1)]
    [found] = corrections([seen(model, output_tokens=100, input_tokens=1)], known, [estimate(10**9)], PRICES, now=LATER)[0]
    assert found.at_most_nano == 100 * 2_500


# What the ledger has to say


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_ledger_s_evidence_is_by_day_model_and_certainty(tmp_path, engine):
    path = new_ledger(tmp_path, engine)
    ledger = await Ledger.open(url(path))
    at = DAY * DAY_S + 3600.0
    for number, (cost, parts, ended) in enumerate([(10, (Part(10),), at), (None, (), at), (0, (Part(0),), at), (7, (Part(7),), at + DAY_S)]):
        held = await ledger.reserve(CALL, 100, (), now=at)
        flags = ("estimated:no_status",) if cost is None else ()
        await ledger.settle(held, Settlement(cost, parts, Outcome(model_served=f"m{number}", flags=flags)), now=ended)
    await ledger.close()
    with connect.reading(path) as db:
        found = provider_comparison.metered(db, since=at - 1, until=at + 1)
        [open_ended] = provider_comparison.estimates(db, since=at - 1, until=at + 1)
        assert provider_comparison.metered(db, since=at + 1, until=at + 2) == []
    assert [(each.day, each.ended_day, each.nano, each.output_tokens) for each in found] == [(DAY, DAY, 10, 5), (DAY, DAY + 1, 7, 5)]
    assert (open_ended.spent_nano, open_ended.metered_nano, open_ended.model) == (100, 0, "m1")


async def test_progress_goes_to_a_terminal_only_the_answer_to_a_pipe(tmp_path):
    """On a terminal reconcile shows its progress; the answer alone goes to a pipe."""
    terminal, its_end = pty.openpty()
    async with Simulator() as api, gateway(tmp_path, api, policy=ADMIN) as gw:
        await gw.client().messages.create(**HELLO)
        await gw.quiet()
        where = ["--policies", str(tmp_path / "policies"), "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}", "--since", "1d", "--json"]
        command_line = [sys.executable, "-m", "gateway_addon", "reconcile", *where]
        process = await asyncio.create_subprocess_exec(*command_line, stdout=asyncio.subprocess.PIPE, stderr=its_end)
        answered, _ = await asyncio.wait_for(process.communicate(), 60)
    shown = os.read(terminal, 4096).decode()
    os.close(terminal), os.close(its_end)
    assert "page 1 of the provider's reports\r\x1b[Kpage 2" in shown
    assert shown.endswith("\r\x1b[K")
    assert json.loads(answered)["agreement_percent"] == 100


# The provider's side


async def test_every_page_of_a_long_report_is_read():
    pages: list[int] = []
    async with Simulator() as api:
        await direct_call(api)
        client = AdminApi(api.url, ADMIN_KEY, pages.append)
        found = await asyncio.to_thread(client.usage, time.time() - 100 * DAY_S, None)
        book = await api.settled()
    assert [(each.counts.output_tokens, each.model) for each in found] == [(book.messages()[0].usage.output_tokens, "claude-haiku-4-5-20251001")]
    assert pages == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"{}", "did not take the admin key"),
        (429, b"{}", "less often"),
        (500, b"{}", "answered 500"),
        (302, b"{}", "answered 302"),
        (200, b"<html>", "not in the shape"),
        (200, b'{"data": 3}', "not in the shape"),
    ],
)
async def test_missing_report_is_a_sentence_without_the_key(status, body, said):
    """A report that cannot be fetched is a sentence without the key."""
    async with upstream(answer(status, "application/json", body)) as far:
        with pytest.raises(ReportUnavailable, match=said) as problem:
            await asyncio.to_thread(AdminApi(far.url, ADMIN_KEY).usage, 0, None)
    assert ADMIN_KEY not in str(problem.value)


async def test_a_provider_that_is_not_there_is_a_sentence():
    with pytest.raises(ReportUnavailable, match="cannot be reached"):
        await asyncio.to_thread(AdminApi("http://127.0.0.1:9", ADMIN_KEY).usage, 0, None)
