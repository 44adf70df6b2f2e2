"""An older gateway and this one on one server, during an upgrade: no cap is passed, and each judges by its own text."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import anthropic
import postgresql
import pytest
from gateway import AUTHORITIES
from ledgers import rows, until
from processes import buried, ledgered

from gateway_addon.ledger import connect
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.reports import entry_history
from gateway_addon.ledger.store.migrations import ON_SERVER
from gateway_addon.simulator import Simulator

ROOT = Path(__file__).parents[2]
OLD = "ee957ce"
"""The last version whose batches took two round trips, the commit a statement of its own."""
CAP_NANO = 200_000_000
POLICY = "models: {allow: [claude-haiku-4-5]}\ncaps: {day: $0.20}\neach: {session: {ever: $0.03}}\n"
TABLES = ["migrations.py", "postgres_schema.py", "sqlite_schema.py"]


@pytest.fixture
def old(tmp_path):
    """The older version's tree."""
    packed = subprocess.run(["git", "-C", ROOT, "archive", OLD, "gateway_addon"], capture_output=True)
    if packed.returncode:
        pytest.skip(f"this checkout has no commit {OLD}: a shallow clone, or no repository")
    (tmp_path / "old").mkdir()
    subprocess.run(["tar", "x", "-C", tmp_path / "old"], input=packed.stdout, check=True)
    return tmp_path / "old"


def as_old(tree):
    return {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}


async def call(url, token, session, said):
    http = anthropic.DefaultAsyncHttpxClient(verify=AUTHORITIES)
    headers = {"x-claude-code-session-id": session}
    async with anthropic.AsyncAnthropic(base_url=url, api_key=token, http_client=http, max_retries=0, default_headers=headers) as client:
        try:
            await client.messages.create(model="claude-haiku-4-5", max_tokens=700, messages=[{"role": "user", "content": "x"}])
            said["answered"] += 1
        except anthropic.APIStatusError as error:
            said[error.response.headers.get("x-gateway-refusal", f"upstream {error.status_code}")] += 1


async def crowd(urls, token, count, said):
    await asyncio.gather(*(call(urls[number % len(urls)], token, f"s{number % 9}", said) for number in range(count)))


def judged(place, book):
    """What was spent, once every call is in the books of both."""
    with connect.reading(place) as db:
        assert findings(db) == []
        spent_nano = sum(each.spent_nano for each in entry_history.forwarded(db))
        assert max(level.nano for level in entry_history.high_water(db) if level.scope == "app:app") <= CAP_NANO
    assert book.billed_nano <= spent_nano <= CAP_NANO
    return spent_nano


@pytest.mark.soak
async def test_an_old_gateway_and_a_new_one_share_caps_side_by_side(tmp_path, old):
    """Where the tables are the same. They are not since, so the old one is given today's."""
    for name in TABLES:
        shutil.copy(ROOT / "gateway_addon/ledger/store" / name, old / "gateway_addon/ledger/store" / name)
    place, said = postgresql.shared().ledger(), Counter()
    async with Simulator() as api, AsyncExitStack() as stack:
        gateways = ledgered(tmp_path, api.url, {"app": POLICY}, ledger=place)
        started = [await gateways.serve(**as_old(old)), await gateways.serve()]
        for process, _ in started:
            stack.push_async_callback(buried, process)
            stack.callback(process.send_signal, signal.SIGTERM)
        while said["cap_spent"] < 20:
            await crowd([url for _, url in started], gateways.tokens["app"], 40, said)
        await until(lambda: rows(place, "SELECT count(*) FROM calls WHERE state = 'open'") == [(0,)])
        spent_nano = judged(place, await api.settled())
        owners = rows(place, "SELECT owner, count(*) FROM calls WHERE state = 'settled' GROUP BY owner")
    print(f"{dict(said)}, by gateway: {owners}", file=sys.stderr)
    assert len(owners) == 2
    assert spent_nano > 0.9 * CAP_NANO
    assert said["ledger"] == said["internal"] == 0, said


@pytest.mark.soak
async def test_new_tables_end_an_old_gateways_writing_at_once(tmp_path, old):
    """It refuses, with nothing forwarded; the calls that it had are in the books of whoever is left."""
    place, said = postgresql.shared().ledger(), Counter()
    news = [name for name, _ in ON_SERVER if name not in (old / "gateway_addon/ledger/store/migrations.py").read_text()]
    if not news:
        pytest.skip("no table has changed since")
    async with Simulator() as api, AsyncExitStack() as stack:
        gateways = ledgered(tmp_path, api.url, {"app": POLICY}, ledger=place)
        for name in news:
            rows(place, "DELETE FROM migrations WHERE name = $1 RETURNING name", name)  # as the old one left it, as far as it looks
        before, old_url = await gateways.serve(**as_old(old))
        stack.push_async_callback(buried, before)
        stack.callback(before.send_signal, signal.SIGTERM)
        await crowd([old_url], gateways.tokens["app"], 20, said)
        for name in news:
            rows(place, "INSERT INTO migrations VALUES ($1) RETURNING name", name)
        after, new_url = await gateways.serve()
        stack.push_async_callback(buried, after)
        stack.callback(after.send_signal, signal.SIGTERM)
        refused: Counter = Counter()
        sent = api.book.requests
        await crowd([old_url], gateways.tokens["app"], 10, refused)
        assert (refused, api.book.requests) == (Counter(ledger=10), sent)
        await crowd([new_url], gateways.tokens["app"], 40, said)
        await until(lambda: rows(place, "SELECT count(*) FROM calls WHERE state = 'open'") == [(0,)])
        judged(place, await api.settled())
    assert said["answered"] > 20
