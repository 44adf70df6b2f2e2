"""The provider's own loops through the whole gateway: what each turn may write and read is held before the first of them runs."""

import asyncio
import json
from dataclasses import replace

import anthropic
import pytest
from gateway import gateway
from ledgers import rows

from gateway_addon.simulator import Behaviour, Simulator

DOLLAR = 1_000_000_000
POLICY = """
models: {allow: [claude-opus-5-5]}
caps: {day: CAP}
features: {web_search: {max_uses: 5, tokens_per_use: 10k}}
reserve: RESERVE
"""


def ask(version="20250305", *, max_tokens=32_000, max_uses=5, simulate=None, **more):
    tool = {"type": f"web_search_{version}", "name": "web_search", "max_uses": max_uses, **more}
    text = f"simulate: {json.dumps(simulate)}" if simulate else "hello"
    return {"model": "claude-opus-5-5", "max_tokens": max_tokens, "tools": [tool], "messages": [{"role": "user", "content": text}]}


HOSTILE = Behaviour(hostile=True, result_tokens=10_000)


async def create(gw, body):
    return await gw.client().with_options(timeout=60).messages.create(**body)


async def streamed(gw, body):
    """The raw text of a stream, as far as it came."""
    async with gw.client().messages.with_streaming_response.create(**body, stream=True) as answer:
        return "".join([chunk.decode() async for chunk in answer.iter_bytes()])


def policy(cap, reserve="full"):
    return {"app": POLICY.replace("CAP", cap).replace("RESERVE", reserve)}


@pytest.mark.parametrize(("version", "largest"), [("20250305", "9,859."), ("20260209", None)])
async def test_a_loop_that_would_pass_its_cap_is_refused(tmp_path, version, largest):
    """Held as one answer, the call with code between its searches took $3.43 of a cap of $8, and was billed $18.67."""
    async with Simulator(behaviour=HOSTILE) as api, gateway(tmp_path, api, policy("$3")) as gw:
        with pytest.raises(anthropic.RateLimitError) as said:
            await create(gw, ask(version))
        await gw.quiet()
        assert said.value.response.headers["x-gateway-refusal"] == "quote_over_cap"
        if largest is None:
            assert 'by itself is too dear (web_search): leave it out, or allow fewer uses (max_uses), called directly only' in str(said.value)
        else:
            assert f"The largest max_tokens that fits is {largest}" in str(said.value)
        assert (await api.settled()).messages() == []


@pytest.mark.parametrize("version", ["20250305", "20260209"])
async def test_the_dearest_loop_stays_within_its_quote(tmp_path, version):
    """The simulated API fills every turn, reads all of it again each time, and runs code between searches where it may."""
    async with Simulator(behaviour=HOSTILE) as api, gateway(tmp_path, api, policy("$30")) as gw:
        await create(gw, ask(version, max_tokens=3_000))
        await gw.quiet()
        billed_nano = (await api.settled()).billed_nano
        [(quote_nano,)] = rows(tmp_path / "gateway.db", "SELECT quote_nano FROM calls")
        assert await gw.spent_nano() == billed_nano
        assert 0.8 * quote_nano < billed_nano <= quote_nano


async def test_a_streamed_loop_is_cut_where_its_budget_ends(tmp_path):
    """What is written in one turn is read in all later ones: each token of a grant is held with the prompts that it lengthens."""
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "prices.yaml").write_text("assumed: {lag_s: 1}\n")
    behaviour = replace(HOSTILE, tokens_per_s=380, tokens_per_event=40, ahead_s=0.2, after_disconnect_s=0.5)
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, policy("$1.21", "progressive")) as gw:
        answer = await asyncio.wait_for(streamed(gw, ask()), 60)
        await gw.quiet()
        billed_nano = (await api.settled()).billed_nano
        assert "does not allow this answer to go on" in answer
        assert DOLLAR // 50 < billed_nano <= await gw.spent_nano() <= 1.21 * DOLLAR
