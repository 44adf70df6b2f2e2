"""The simulated API's batches and files, held against the official SDK: the real wire format, and bills at half price."""

from collections.abc import AsyncIterator

import anthropic
import httpx2
import pytest

from gateway_addon.simulator import KEY, Behaviour, Simulator
from gateway_addon.simulator.prices import MODELS

HAIKU = "claude-haiku-4-5-20251001"


@pytest.fixture
async def api() -> AsyncIterator[Simulator]:
    async with Simulator() as running:
        yield running


@pytest.fixture
async def client(api: Simulator) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=api.url, api_key=KEY, max_retries=0) as sdk:
        yield sdk


def asked(custom_id: str, wish: str = "succeeded", **more):
    simulate = f'simulate: {{"batch_result": "{wish}"}}'
    return {"custom_id": custom_id, "params": {"model": HAIKU, "max_tokens": 100, "messages": [{"role": "user", "content": simulate}], **more}}


async def test_a_batch_is_in_progress_until_somebody_sees_it_ended(client):
    made = await client.messages.batches.create(requests=[asked("a")])
    assert (made.processing_status, made.request_counts.processing, made.results_url) == ("in_progress", 1, None)
    ended = await client.messages.batches.retrieve(made.id)
    assert (ended.processing_status, ended.request_counts.succeeded, ended.results_url is None) == ("ended", 1, False)
    assert (ended.expires_at - ended.created_at).total_seconds() == 86_400


async def test_entries_end_apart_and_only_successes_bill_half_price(api, client):
    """Each entry ends in its own way, and only those that succeeded are billed, at half price."""
    wishes = ("succeeded", "errored", "canceled", "expired")
    made = await client.messages.batches.create(requests=[*(asked(wish, wish) for wish in wishes), asked("broken", max_tokens=10**9)])
    results = {line.custom_id: line.result async for line in await client.messages.batches.results(made.id)}
    assert {name: result.type for name, result in results.items()} == dict.fromkeys(wishes, "") | {wish: wish for wish in wishes} | {"broken": "errored"}
    usage = results["succeeded"].message.usage
    price = MODELS[HAIKU].price
    assert usage.service_tier == "batch"
    assert api.book.billed_nano == -(-(usage.input_tokens * price.input + usage.output_tokens * price.output) // 2)


async def test_what_is_cancelled_before_its_end_costs_nothing(api, client):
    api.behaviour = Behaviour(batch_s=60)
    made = await client.messages.batches.create(requests=[asked("a"), asked("b")])
    assert (await client.messages.batches.cancel(made.id)).processing_status == "canceling"
    ended = await client.messages.batches.retrieve(made.id)
    assert (ended.processing_status, ended.request_counts.canceled, api.book.billed_nano) == ("ended", 2, 0)
    assert (await client.messages.batches.delete(made.id)).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.batches.retrieve(made.id)


async def test_batches_come_in_pages_the_newest_first(client):
    made = [(await client.messages.batches.create(requests=[asked("a")])).id for _ in range(3)]
    assert [batch.id async for batch in client.messages.batches.list(limit=2)] == made[::-1]


@pytest.mark.parametrize("requests", [[], [asked("a"), asked("a")], [{"custom_id": "a"}]], ids=["none", "twice", "no params"])
async def test_a_batch_that_makes_no_sense_is_refused(client, requests):
    with pytest.raises(anthropic.BadRequestError):
        await client.messages.batches.create(requests=requests)


async def test_a_file_comes_back_as_it_was_uploaded(client):
    made = await client.files.upload(file=("notes.txt", b"\x00line\r\nline\n", "text/plain"))
    assert (made.filename, made.mime_type, made.size_bytes) == ("notes.txt", "text/plain", 12)
    assert await (await client.files.download(made.id)).read() == b"\x00line\r\nline\n"
    assert [file.id async for file in client.files.list()] == [made.id]
    await client.files.delete(made.id)
    with pytest.raises(anthropic.NotFoundError):
        await client.files.retrieve_metadata(made.id)


async def test_an_upload_without_a_file_is_refused(api):
    async with httpx2.AsyncClient(base_url=api.url, headers={"x-api-key": KEY}) as http:
        assert (await http.post("/v1/files", json={})).status_code == 400
