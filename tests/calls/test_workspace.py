"""The shared workspace through a real gateway, by the official SDK: what an app made is its own, batches are reserved whole and settled once."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import anthropic
import httpx2
import pytest
from gateway import gateway

from gateway_addon.ledger import batches
from gateway_addon.ledger.maintenance import invariants
from gateway_addon.simulator import KEY, Behaviour, Simulator
from gateway_addon.simulator.errors import ApiError

APP = """
models: {allow: [claude-haiku-4-5, claude-sonnet-5], aliases: {fast: claude-haiku-4-5}}
caps: {day: $100}
endpoints: [messages, count_tokens, models, batches, files]
features: {files: true}
max_tokens: {limit: 500, over: clamp}
"""
TWO = {"app": APP, "other": APP}
SLOW = Behaviour(batch_s=60)


def asked(custom_id, text="Say hello.", wish=None, **more):
    content = text if wish is None else f'simulate: {{"batch_result": "{wish}"}}'
    return {"custom_id": custom_id, "params": {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": content}], **more}}


@asynccontextmanager
async def running(folder, behaviour=SLOW, apps=TWO, **options):
    async with Simulator(behaviour=behaviour) as api, gateway(folder, api, apps, **options) as gw:
        yield gw


async def created(gw, *requests, app="app"):
    return await gw.client(app).messages.batches.create(requests=list(requests) or [asked("a")])


async def results(gw, id, app="app"):
    return {line.custom_id: line.result async for line in await gw.client(app).messages.batches.results(id)}


def ends(gw):
    """Let every batch end now."""
    for batch in gw.api.batches.made.values():
        batch.ends_at = time.time()


async def sound(gw):
    """The ledger agrees with the API's book to the nano-dollar, holds nothing, and proves itself."""
    await gw.quiet()
    assert (await gw.spent_nano(), await gw.held_nano()) == ((await gw.api.settled()).billed_nano, 0)
    assert await gw.gateway.ledger.look(invariants.findings) == []


# --- batches: money


async def test_a_batch_is_settled_at_what_the_api_billed_for_it(tmp_path):
    async with running(tmp_path, Behaviour()) as gw:
        made = await created(gw, asked("a"), asked("b", model="claude-sonnet-5"), asked("c", "x" * 5000), asked("d", system=[{"type": "text", "text": "y" * 9000, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]))
        held = await gw.held_nano()
        assert {name: result.type for name, result in (await results(gw, made.id)).items()} == dict.fromkeys("abcd", "succeeded")
        await sound(gw)
        assert 0 < await gw.spent_nano("app:app") < held
        kept = await gw.gateway.ledger.look(lambda db: db.execute("SELECT custom_id, model FROM batch_usage ORDER BY custom_id").fetchall())
        haiku = "claude-haiku-4-5-20251001"
        assert kept == [("a", haiku), ("b", "claude-sonnet-5"), ("c", haiku), ("d", haiku)]


async def test_settled_batch_is_reported_once_to_on_call(tmp_path):
    """A batch is reported to `on_call` once, when it is settled."""
    told = []
    async with running(tmp_path, Behaviour(), on_call=told.append) as gw:
        made = await created(gw, asked("a"), asked("b"))
        assert told == []
        await results(gw, made.id)
        await sound(gw)
        await results(gw, made.id)
        [call] = [each for each in told if each["endpoint"] == "batches.create"]
        assert (call["app"], call["state"], call["spent_nano"], call["model"]) == ("app", "settled", gw.api.book.billed_nano, "claude-haiku-4-5")
        assert call["output_tokens"] == sum(row.usage.output_tokens for row in gw.api.book.messages())


async def test_errored_expired_and_cancelled_entries_cost_nothing(tmp_path):
    async with running(tmp_path, Behaviour()) as gw:
        wishes = ("errored", "expired", "canceled", "succeeded")
        made = await created(gw, *(asked(wish, wish=wish) for wish in wishes))
        assert {name: result.type for name, result in (await results(gw, made.id)).items()} == {wish: wish for wish in wishes}
        await sound(gw)
        assert await gw.spent_nano() > 0


async def test_a_cancelled_batch_costs_nothing(tmp_path):
    async with running(tmp_path) as gw:
        made = await created(gw, asked("a"), asked("b"))
        assert (await gw.client().messages.batches.cancel(made.id)).processing_status == "canceling"
        assert {result.type for result in (await results(gw, made.id)).values()} == {"canceled"}
        await sound(gw)
        assert await gw.spent_nano() == 0


async def test_results_read_again_and_by_several_at_once_settle_once(tmp_path):
    async with running(tmp_path, Behaviour()) as gw:
        made = await created(gw, *(asked(f"r{number}") for number in range(250)))
        await asyncio.gather(*(results(gw, made.id) for _ in range(3)))
        await results(gw, made.id)
        await sound(gw)


async def test_broken_off_results_settle_nothing_until_read_whole(tmp_path):
    """Results that break off settle nothing until they are read whole."""
    async with running(tmp_path, Behaviour(cut_after_bytes=3000)) as gw:
        made = await created(gw, *(asked(f"r{number}") for number in range(20)))
        held = await gw.held_nano()
        with pytest.raises((httpx2.HTTPError, anthropic.APIError)):
            await results(gw, made.id)
        await asyncio.sleep(0.1)
        assert (await gw.spent_nano(), await gw.held_nano()) == (0, held)
        gw.api.behaviour = Behaviour()
        await results(gw, made.id)
        await sound(gw)


async def test_a_batch_over_a_cap_is_refused_before_anything_is_sent(tmp_path):
    async with running(tmp_path, apps={"app": APP.replace("$100", "$0.01")}) as gw:
        with pytest.raises(anthropic.RateLimitError, match=r"This batch of 30 requests can cost up to \$0\.0\d+, more than the cap for today of the app 'app' \(\$0\.01, .*Send fewer"):
            await created(gw, *(asked(f"r{number}") for number in range(30)))
        await created(gw)
        assert [row.method for row in gw.api.book.all()] == ["POST"]


async def test_a_batch_counts_against_every_cap_while_it_is_open(tmp_path, monkeypatch):
    monkeypatch.setattr("gateway_addon.calls.queue.HELD_WAIT_S", 0.1)
    async with running(tmp_path, apps={"app": APP.replace("$100", "$0.002")}) as gw:
        await created(gw, *(asked(f"r{number}") for number in range(2)))
        async with httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": gw.tokens["app"]}) as http:
            me = (await http.get("/gateway/me")).json()
        day = next(window for window in me["windows"] if window["window"] == "day")
        assert day["held_nano"] == await gw.held_nano() > 0
        with pytest.raises(anthropic.RateLimitError, match="held"):
            await created(gw, *(asked(f"r{number}") for number in range(2)))


async def test_failed_creation_is_voided_a_lost_answer_is_settled(tmp_path, monkeypatch):
    """A creation that fails is voided; one whose answer is lost is settled at what it held."""
    status = None

    async def fail(simulator, exchange, request_id):
        if status is None:
            exchange.hang_up()
        if status == 521:
            return await exchange.answer(521, [("content-type", "text/html")], b"<html>")
        raise ApiError.of_status(status, None)

    async with running(tmp_path) as gw:
        monkeypatch.setattr(Simulator, "_endpoint", fail)
        for status, is_spent in ((529, False), (400, False), (521, False), (None, True)):
            with pytest.raises(anthropic.APIError):
                await created(gw)
            await gw.quiet()
            assert (await gw.held_nano(), await gw.spent_nano() > 0) == (0, is_spent), status


async def test_without_a_ledger_nothing_is_sent(tmp_path):
    async with running(tmp_path) as gw:
        made = await created(gw)
        before = gw.api.book.requests
        (tmp_path / "gateway.db").rename(tmp_path / "elsewhere.db")
        for call in (created(gw), results(gw, made.id), gw.client().messages.batches.list(), gw.client().files.upload(file=b"x")):
            with pytest.raises(anthropic.ServiceUnavailableError):
                await call
        assert gw.api.book.requests == before
        (tmp_path / "elsewhere.db").rename(tmp_path / "gateway.db")


# --- batches: policy


HIDDEN = [
    (asked("bad", model="claude-opus-5-5"), r"requests\[7\] \(bad\): The app 'app' may not use claude-opus-5-5"),
    (asked("bad", tools=[{"type": "web_search_20250305", "name": "web_search"}]), r"requests\[7\] \(bad\): The app 'app' may not use web_search"),
    (asked("bad", turbo=True), r"requests\[7\] \(bad\): The app 'app' sends turbo"),
    (asked("bad", fallbacks=[{"model": "claude-opus-5-5"}]), r"requests\[7\] \(bad\): The app 'app' may not use (claude-opus-5-5|fallbacks)"),
]


async def test_request_hidden_among_many_is_judged_like_a_call(tmp_path):
    """One request hidden among many is judged like a call of its own."""
    async with running(tmp_path) as gw:
        for hidden, message in HIDDEN:
            requests = [asked(f"r{number}") for number in range(40)]
            requests[7] = hidden
            with pytest.raises(anthropic.PermissionDeniedError, match=message):
                await created(gw, *requests)
        assert (gw.api.book.all(), await gw.held_nano()) == ([], 0)


async def test_the_cap_for_one_request_holds_for_each_of_a_batch(tmp_path):
    async with running(tmp_path, apps={"app": APP.replace("{day: $100}", "{request: $0.002, day: $100}")}) as gw:
        await created(gw, *(asked(f"r{number}") for number in range(20)))
        with pytest.raises(anthropic.RateLimitError, match=r"requests\[1\] \(long\): .*more than the cap for one request of the app 'app'"):
            await created(gw, asked("a"), asked("long", "x" * 9000))


async def test_what_the_policy_rewrites_is_rewritten_inside_a_batch(tmp_path):
    async with running(tmp_path, Behaviour()) as gw:
        made = await created(gw, asked("a", model="fast", max_tokens=9000), asked("b"))
        sent = [entry.params for entry in gw.api.batches.made[made.id].entries]
        assert [(params["model"], params["max_tokens"]) for params in sent] == [("claude-haiku-4-5", 500), ("claude-haiku-4-5", 100)]
        await results(gw, made.id)
        await sound(gw)
        flags = await gw.gateway.ledger.look(lambda db: db.execute("SELECT flags FROM calls WHERE endpoint = 'batches.create'").fetchall())
        assert flags == [("edited:model edited:max_tokens",)]


async def test_unedited_batch_reaches_the_api_to_the_byte(tmp_path):
    """A batch that needs no rewriting reaches the api to the byte."""
    body = json.dumps({"requests": [asked("a")]}, indent=3).encode()
    async with running(tmp_path) as gw, httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": gw.tokens["app"], "anthropic-version": "2023-06-01"}) as http:
        answer = await http.post("/v1/messages/batches", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200
        [row] = gw.api.book.all()
        assert (row.body_bytes, row.header("x-api-key")) == (len(body), KEY)


# --- whose it is


async def a_batch_and_a_file(gw, app):
    batch = await created(gw, app=app)
    file = await gw.client(app).files.upload(file=("notes.txt", b"hello", "text/plain"))
    return batch.id, file.id


ITEM_PATHS = [
    ("GET", "/v1/messages/batches/{batch}"),
    ("GET", "/v1/messages/batches/{batch}/results"),
    ("POST", "/v1/messages/batches/{batch}/cancel"),
    ("DELETE", "/v1/messages/batches/{batch}"),
    ("GET", "/v1/messages/batches?after_id={batch}"),
    ("GET", "/v1/messages/batches?before_id={batch}"),
    ("GET", "/v1/files/{file}"),
    ("GET", "/v1/files/{file}/content"),
    ("DELETE", "/v1/files/{file}"),
    ("GET", "/v1/files?page=page_{file}"),
]


async def test_foreign_objects_do_not_exist_and_nothing_is_sent(tmp_path):
    """An object that the app does not own is not there for it, and nothing is sent."""
    async with running(tmp_path) as gw, httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": gw.tokens["other"]}) as http:
        theirs = await a_batch_and_a_file(gw, "app")
        before = gw.api.book.bytes_received
        for batch, file in (theirs, tuple(f"{id[:-3]}xyz" for id in theirs)):  # another app's, nobody's
            said = set()
            for method, path in ITEM_PATHS:
                answer = await http.request(method, path.format(batch=batch, file=file))
                error = answer.json()
                assert (answer.status_code, error["type"], error["error"]["type"]) == (404, "error", "not_found_error"), (method, path)
                said.add(error["error"]["message"])
            named = (("message batch", batch), ("file", file))
            assert said == {f"App other has no {what} {id!r} here; it sees those that it made through this gateway." for what, id in named}
        assert gw.api.book.bytes_received == before


async def test_lists_show_an_app_its_own_alone_in_pages(tmp_path):
    async with running(tmp_path) as gw:
        mine, theirs = [], []
        for _ in range(3):
            mine.append(await a_batch_and_a_file(gw, "app"))
            theirs.append(await a_batch_and_a_file(gw, "other"))
        client = gw.client()
        assert [batch.id async for batch in client.messages.batches.list(limit=2)] == [batch for batch, _ in mine[::-1]]
        assert [file.id async for file in client.files.list(limit=2)] == [file for _, file in mine[::-1]]
        page = await client.messages.batches.list(limit=2)
        assert (page.has_more, page.first_id, page.last_id) == (True, mine[2][0], mine[1][0])
        older = await client.messages.batches.list(limit=2, before_id=mine[0][0])
        assert ([batch.id for batch in older.data], older.has_more) == ([mine[2][0], mine[1][0]], False)
        assert [file.id async for file in client.files.list(ids=[mine[0][1], theirs[0][1]])] == [mine[0][1]]
        nobody = gw.client("other").messages.batches
        assert {batch.id async for batch in nobody.list()} == {batch for batch, _ in theirs}


async def test_a_list_shows_a_batch_as_it_was_last_seen(tmp_path):
    async with running(tmp_path) as gw:
        made = await created(gw)
        ends(gw)
        client = gw.client().messages.batches
        assert [batch.processing_status async for batch in client.list()] == ["in_progress"]
        assert (await client.retrieve(made.id)).processing_status == "ended"
        assert [batch.processing_status async for batch in client.list()] == ["ended"]


async def test_the_address_of_results_leads_back_through_the_gateway(tmp_path):
    async with running(tmp_path, Behaviour()) as gw:
        made = await created(gw)
        ended = await gw.client().messages.batches.retrieve(made.id)
        assert ended.results_url == f"/v1/messages/batches/{made.id}/results"
        [shown] = [batch async for batch in gw.client().messages.batches.list()]
        assert shown.results_url == ended.results_url


async def test_a_batch_is_deleted_once_it_is_settled_and_not_before(tmp_path):
    async with running(tmp_path, Behaviour()) as gw:
        made = await created(gw)
        client = gw.client().messages.batches
        with pytest.raises(anthropic.ConflictError, match=r"Batch msgbatch_\w+ is not settled yet; fetch its results first"):
            await client.delete(made.id)
        await results(gw, made.id)
        await sound(gw)
        assert (await client.delete(made.id)).type == "message_batch_deleted"
        with pytest.raises(anthropic.NotFoundError):
            await client.retrieve(made.id)
        assert [batch async for batch in client.list()] == []
        await sound(gw)


async def test_a_file_is_its_apps_to_read_and_to_delete(tmp_path):
    content = bytes(range(256)) * 1000
    async with running(tmp_path) as gw:
        files = gw.client().files
        made = await files.upload(file=("notes.bin", content, "application/octet-stream"))
        assert (await files.retrieve_metadata(made.id)).size_bytes == len(content)
        assert await (await files.download(made.id)).read() == content
        await files.delete(made.id)
        with pytest.raises(anthropic.NotFoundError) as gone:
            await files.retrieve_metadata(made.id)
        assert gone.value.response.headers["x-gateway-refusal"] == "not_found", "the gateway's own answer: nothing is sent"
        assert [file async for file in files.list()] == []


async def test_a_file_in_a_body_has_to_be_the_apps_own(tmp_path):
    async with running(tmp_path) as gw:
        uploaded = {app: (await gw.client(app).files.upload(file=("a.txt", b"hello", "text/plain"))).id for app in TWO}
        client = gw.client().messages

        def uses(file_id):
            block = {"type": "document", "source": {"type": "file", "file_id": file_id}}
            ask = {"model": "claude-haiku-4-5", "messages": [{"role": "user", "content": [block]}]}
            yield client.create(**ask, max_tokens=100)
            yield client.count_tokens(**ask)
            yield client.batches.create(requests=[{"custom_id": "a", "params": {**ask, "max_tokens": 100}}])

        for use in uses(uploaded["app"]):
            await use
        before = gw.api.book.requests
        for foreign in (uploaded["other"], "file_nobody"):
            for use in uses(foreign):
                with pytest.raises(anthropic.NotFoundError, match=f"The app 'app' has no file '{foreign}' here; it may use those that it uploaded"):
                    await use
        assert gw.api.book.requests == before


async def test_observed_app_may_use_old_files_but_no_other_apps(tmp_path):
    """An app in observe mode may use files of before the gateway, but no other app's."""
    async with running(tmp_path, apps={"app": APP + "mode: observe\n", "other": APP}) as gw:
        theirs = (await gw.client("other").files.upload(file=("a.txt", b"hello", "text/plain"))).id

        async def use(file_id):
            block = {"type": "document", "source": {"type": "file", "file_id": file_id}}
            await gw.client().messages.create(model="claude-haiku-4-5", max_tokens=100, messages=[{"role": "user", "content": [block]}])

        await use("file_01OfBefore")
        with pytest.raises(anthropic.NotFoundError):
            await use(theirs)


async def test_observed_app_makes_a_batch_over_its_cap_flagged(tmp_path):
    """An app in observe mode makes a batch over its cap, and the batch is flagged."""
    observed = APP.replace("$100", "$0.0001") + "mode: observe\n"
    async with running(tmp_path, Behaviour(), apps={"app": observed}) as gw:
        made = await created(gw, asked("a"))
        await results(gw, made.id)
        await sound(gw)
        flags = await gw.gateway.ledger.look(lambda db: db.execute("SELECT flags FROM calls WHERE endpoint = 'batches.create'").fetchall())
        assert flags == [("observed:quote_over_cap",)]


async def test_an_app_whose_policy_names_neither_is_refused_both(tmp_path):
    async with running(tmp_path, apps={"app": "models: {allow: [claude-haiku-4-5]}\ncaps: unlimited\n"}) as gw:
        for call in (created(gw), gw.client().messages.batches.list(), gw.client().files.list(), gw.client().files.upload(file=b"x")):
            with pytest.raises(anthropic.PermissionDeniedError, match=r"The app 'app' may not call (batches|files); allowed: messages"):
                await call
        assert gw.api.book.bytes_received == 0


async def test_the_results_pass_while_the_api_is_still_sending(tmp_path, monkeypatch):
    """Unbuffered: the first line is here before the last one was sent."""
    sending = asyncio.Event()

    async def slowly(self, exchange, request_id, id):
        first, second = self.batches.results(id)
        await exchange.start(200, [("content-type", "application/x-jsonl")])
        await exchange.send(first)
        await asyncio.wait_for(sending.wait(), 60)
        await exchange.send(second)
        await exchange.finish()

    async with running(tmp_path, Behaviour()) as gw:
        monkeypatch.setattr(Simulator, "_results", slowly)
        made = await created(gw, asked("a"), asked("b"))
        async with httpx2.AsyncClient(base_url=gw.url, headers={"x-api-key": gw.tokens["app"]}) as http:
            async with http.stream("GET", f"/v1/messages/batches/{made.id}/results") as answer:  # the SDK keeps back some bytes
                lines = []
                async for line in answer.aiter_lines():
                    lines.append(json.loads(line)["custom_id"])
                    sending.set()
        assert lines == ["b", "a"]
        await sound(gw)


async def test_open_batches_are_listed_with_what_they_hold(tmp_path):
    async with running(tmp_path) as gw:
        made = await created(gw, asked("a"), asked("b"))
        [line] = await gw.gateway.ledger.look(batches.open_batches)
        assert (line.id, line.app, line.requests, line.status, line.held_nano) == (made.id, "app", 2, "in_progress", await gw.held_nano())
