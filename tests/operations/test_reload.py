"""Hot reload: a saved policy is in force within a second, a broken one never is, and no call meets half of one."""

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import anthropic
import pytest
from click.testing import CliRunner
from gateway import Running, gateway
from ledgers import ENGINES, new_ledger, until, url

from gateway_addon.cli.check import check
from gateway_addon.identity.fingerprint import fingerprint
from gateway_addon.ledger import Ledger, LedgerUnavailable, admin, connect
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.store.sqlite_files import ledger_path
from gateway_addon.operations import jobs, reload
from gateway_addon.operations.reload import KEY_PROBLEM, LOOK_EVERY_S, PolicyWatcher, align, audit_key, must_agree
from gateway_addon.policy import load
from gateway_addon.simulator import KEY, Behaviour, Simulator

# Under FIRST only haiku up to 100 tokens, under SECOND only sonnet up to 200: a mixture would let a haiku with 200 through.
FIRST = "models: {allow: [claude-haiku-4-5]}\nmax_tokens: 100\ncaps: unlimited\n"
SECOND = "models: {allow: [claude-sonnet-5]}\nmax_tokens: 200\ncaps: unlimited\n"
BROKEN = "models: {allow: [claude-haiku-4-5]}\nmax_tokens: 200\ncaps: {mnth: $5}\n"
MESSAGES = [{"role": "user", "content": "hi"}]


def watcher(running: Running) -> PolicyWatcher:
    return PolicyWatcher(running.folder / "policies", running.gateway, running.addon.key)


@contextlib.asynccontextmanager
async def watched(running: Running):
    """The watcher of `gateway serve`, for as long as the block runs."""
    await align(running.gateway.ledger, running.gateway.policy, "ana")
    async with jobs.running((LOOK_EVERY_S, "the policy", watcher(running).watch)):
        yield running.folder / "policies" / "apps" / "app.yaml"


async def ask(arguments: list[str]):
    return await asyncio.to_thread(CliRunner().invoke, check, arguments)


async def outcome(client: anthropic.AsyncAnthropic, model: str, max_tokens: int) -> str:
    try:
        await client.messages.create(model=model, max_tokens=max_tokens, messages=MESSAGES)
    except anthropic.APIStatusError as error:
        return error.response.headers["x-gateway-refusal"]
    return "answered"


async def test_saved_policy_holds_at_once_a_broken_one_names_its_line(tmp_path: Path):
    """A saved policy holds for the next call, and a broken one is told with its line."""
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running, watched(running) as file:
        asked = ["--running", "--listen", f"127.0.0.1:{running.port}", "--policies", str(running.folder / "policies")]
        assert "In force" in (await ask(asked)).stdout
        file.write_text(BROKEN)
        await until(lambda: running.gateway.policy_problem is not None)
        refused = await ask(asked)
        assert refused.exit_code == 1
        assert "apps/app.yaml:3: caps.mnth: unknown key, did you mean month?" in refused.stderr
        assert running.gateway.policy.digest[:12] in refused.stderr, "and it names the policy that holds instead"
        assert await outcome(running.client(), "claude-haiku-4-5", 200) == "max_tokens"
        file.write_text(SECOND)
        await until(lambda: running.gateway.policy_problem is None)
        found = json.loads((await ask([*asked, "--json"])).stdout)
        assert found == {"in_force": True, "running": load(running.folder / "policies").digest[:12], "saved": found["running"], "problem": None}
        assert await outcome(running.client(), "claude-sonnet-5", 200) == "answered"


async def test_where_no_gateway_runs_the_check_says_how_to_start_one(tmp_path: Path, unused_tcp_port: int):
    result = await ask(["--running", "--listen", f"127.0.0.1:{unused_tcp_port}", "--policies", str(tmp_path)])
    assert result.exit_code == 1
    assert "gateway serve" in result.stderr


async def test_gateway_with_other_files_is_told_from_this_one(tmp_path: Path):
    """A gateway with other files is not taken for one with these."""
    other = tmp_path / "other"
    (other / "apps").mkdir(parents=True)
    (other / "gateway.yaml").write_text("caps: {day: $1}\n")
    async with Simulator() as api, gateway(tmp_path, api) as running:
        result = await ask(["--running", "--listen", f"127.0.0.1:{running.port}", "--policies", str(other)])
    assert result.exit_code == 1
    assert "reads another folder" in result.stderr


async def test_every_change_is_audited_once_with_diff_and_owner(tmp_path: Path):
    """Every change is audited once, with its diff and whose file it was."""
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running, watched(running) as file:
        digests = [running.gateway.policy.digest]
        for text in (SECOND, BROKEN, FIRST + "reserve: full\n"):
            before = running.gateway.policy, running.gateway.policy_problem
            file.write_text(text)
            await until(lambda before=before: (running.gateway.policy, running.gateway.policy_problem) != before)
            digests += [running.gateway.policy.digest] if text != BROKEN else []
        await align(running.gateway.ledger, running.gateway.policy, "another worker")
        prices = running.folder / "policies" / "prices.yaml"
        prices.write_text("multiplier: 1.5\n")
        await until(lambda: running.gateway.policy.digest not in digests)
        url = f"sqlite:///{running.folder / 'gateway.db'}"
        with connect.reading(ledger_path(url)) as db:
            changes = admin.policy_changes(db, 10)
        assert [change.digest for change in reversed(changes)] == [*digests, running.gateway.policy.digest]
        assert {change.who for change in changes} == {"ana", file.owner()}
        assert all(line in changes[2].diff.splitlines() for line in ("-max_tokens: 100", "+max_tokens: 200", " caps: unlimited"))
        assert "+reserve: full" in changes[1].diff
        assert "+++ prices.yaml after" in changes[0].diff
        assert "+multiplier: 1.5" in changes[0].diff
        shown = await ask(["--changes", "1", "--ledger", url])
        assert "+multiplier: 1.5" in shown.stdout
        assert "max_tokens" not in shown.stdout


async def test_apps_behind_a_symbolic_link_are_watched_like_a_folder(tmp_path: Path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running:
        apps, elsewhere = running.folder / "policies" / "apps", tmp_path / "elsewhere"
        apps.rename(elsewhere)
        apps.symlink_to(elsewhere)
        async with watched(running):
            (elsewhere / "app.yaml").write_text(SECOND)
            await until(lambda: running.gateway.policy.apps["app"].max_tokens.limit == 200)


async def test_half_saved_valid_policy_never_comes_into_force(tmp_path: Path, monkeypatch):
    """A half-saved policy that is a valid policy too never comes into force; one that is saved while it is read is no problem yet."""
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running:
        watching, old, file = watcher(running), running.gateway.policy, running.folder / "policies" / "apps" / "app.yaml"
        half, whole = "models: {allow: [claude-sonnet-5]}\ncaps: unlimited\n", "models: {allow: [claude-sonnet-5]}\ncaps: unlimited\nmax_tokens: 5\n"
        for text in (half, whole):
            file.write_text(text)
            await watching.look()
            assert running.gateway.policy is old
        await watching.look()
        assert running.gateway.policy.apps["app"].max_tokens.limit == 5

        def load_while_saving(folder: Path):
            try:
                return load(folder)
            finally:
                file.write_text(f"{text}# and more\n")

        monkeypatch.setattr(reload, "load", load_while_saving)
        old = running.gateway.policy
        for text in (BROKEN, SECOND):
            file.write_text(text)
            for _ in range(2):
                await watching.look()
            assert (running.gateway.policy, running.gateway.policy_problem) == (old, None)


async def test_files_that_are_saved_together_come_into_force_together(tmp_path: Path):
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running:
        watching, old, policies = watcher(running), running.gateway.policy, running.folder / "policies"
        (policies / "apps" / "app.yaml").write_text(FIRST + "team: jobs\n")  # no such team yet: a mistake by itself
        await watching.look()
        with (policies / "gateway.yaml").open("a") as file:
            file.write("\nteams: {jobs: {caps: {day: $1}}}\n")
        await watching.look()
        assert (running.gateway.policy, running.gateway.policy_problem) == (old, None)
        await watching.look()
        assert (running.gateway.policy.apps["app"].team, running.gateway.policy_problem) == ("jobs", None)


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("prices.yaml", "multiplier: 0\n", "policies/prices.yaml:1: multiplier: '0' is not a number above 0"),
        ("gateway.yaml", "upstream: https://other.example\nkey: {env: SIMULATED_KEY}\n", "policies/gateway.yaml: upstream: restart the gateway to move it"),
        ("gateway.yaml", "upstream: {upstream}\nkey: {file: /nowhere}\n", "The key file /nowhere cannot be read"),
    ],
    ids=["prices", "upstream", "key"],
)
async def test_what_cannot_come_into_force_is_told_and_the_old_stays(tmp_path: Path, file: str, text: str, problem: str):
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running, watched(running):
        (running.folder / "policies" / file).write_text(text.replace("{upstream}", api.url))
        await until(lambda: running.gateway.policy_problem is not None)
        asked = await ask(["--running", "--listen", f"127.0.0.1:{running.port}", "--policies", str(running.folder / "policies")])
        assert (asked.exit_code, problem in asked.stderr) == (1, True), asked.stderr
        assert await outcome(running.client(), "claude-haiku-4-5", 100) == "answered"


async def test_policy_moves_the_key_and_each_key_is_audited_unseen(tmp_path: Path):
    """A policy that names another place for the key moves it, and each key is audited without itself."""
    keys = ["sk-ant-api03-" + letter * 95 for letter in "ab"]
    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running, watched(running):
        place, policy = tmp_path / "key", running.folder / "policies" / "gateway.yaml"
        await audit_key(running.gateway.ledger, running.addon.key)
        place.write_text(keys[0])
        policy.write_text(policy.read_text().replace("{env: SIMULATED_KEY}", f"{{file: {place}}}"))
        await until(lambda: running.addon.key() == keys[0])
        place.write_text("")  # an editor that is still writing: no call may be lost to it
        await until(lambda: running.gateway.key_problem is not None)
        assert running.addon.key() == keys[0]
        asked = await ask(["--running", "--listen", f"127.0.0.1:{running.port}", "--policies", str(running.folder / "policies")])
        assert (asked.exit_code, asked.stderr) == (1, f"{KEY_PROBLEM}\n")
        place.write_text(keys[1])
        await until(lambda: running.gateway.key_problem is None)
        await until(lambda: len(changed(tmp_path, "+key ")) == 3)
        assert [line.split()[1] for line in changed(tmp_path, "+key ")] == [fingerprint(key) for key in (keys[1], keys[0], KEY)]
        shown = await ask(["--changes", "1", "--ledger", f"sqlite:///{tmp_path / 'gateway.db'}"])
    assert f"-key {fingerprint(keys[0])}\n+key {fingerprint(keys[1])} from file {place}\n" in shown.stdout
    assert f"saved by {place.owner()}" in shown.stdout


async def test_a_call_in_flight_is_priced_as_it_was_admitted(tmp_path: Path):
    async with Simulator(behaviour=Behaviour(delay_ms=5)) as api, gateway(tmp_path, api, {"app": FIRST}) as running:
        watching, digest = watcher(running), running.gateway.policy.digest
        async with running.client().messages.stream(model="claude-haiku-4-5", max_tokens=100, messages=MESSAGES) as stream:
            (running.folder / "policies" / "prices.yaml").write_text("multiplier: 3\n")
            await watching.look()
            await watching.look()
            assert running.gateway.policy.digest != digest
            await stream.get_final_message()
        await running.quiet()
        before_nano = await running.spent_nano()
        assert before_nano == (await api.settled()).billed_nano > 0
        await running.client().messages.create(model="claude-haiku-4-5", max_tokens=100, messages=MESSAGES)
        await running.quiet()
        billed_nano = (await api.settled()).billed_nano
        assert await running.spent_nano() == before_nano + 3 * (billed_nano - before_nano), "the next one at the new prices"


STREAMED = "models: {allow: [claude-sonnet-5]}\nreserve: progressive\n"
CAPS_THEN = {
    "dropped": ("caps: {day: $9}\neach: {session: {ever: $9}}\n", "caps: {day: $9}\n"),
    "moved": ("caps: {day: $9}\neach: {session: {ever: $9}}\n", "caps: {day: $9}\neach: {session: {day: $9}}\n"),
    "cycle": ("caps: {day: $9, cycle: {amount: $9, from: 17}}\n", "caps: {day: $9}\n"),
    "added": ("caps: {day: $9}\n", "caps: {day: $9}\neach: {session: {ever: $0.00001}}\n"),
    "lowered": ("caps: {day: $9}\neach: {session: {ever: $9}}\n", "caps: {day: $9}\neach: {session: {ever: $0.00001}}\n"),
}
"""By app: its caps, and those that a reload brings while it streams."""


async def test_streams_are_topped_up_when_a_reload_changes_parts_caps(tmp_path: Path):
    """By the caps that they came under and that are still kept; the next call of their session meets the new ones."""
    asked = {"model": "claude-sonnet-5", "max_tokens": 60_000, "messages": MESSAGES, "extra_headers": {"x-claude-code-session-id": "s1"}}
    behaviour = Behaviour(output_tokens=30_000, tokens_per_s=390, tokens_per_event=40)  # longer than the test
    apps = {app: STREAMED + caps for app, (caps, _) in CAPS_THEN.items()}
    async with Simulator(behaviour=behaviour) as api, gateway(tmp_path, api, apps) as running, contextlib.AsyncExitStack() as streams:
        watching, digest = watcher(running), running.gateway.policy.digest
        for app in CAPS_THEN:
            await streams.enter_async_context(running.client(app).messages.stream(**asked))
        for app, (_, caps) in CAPS_THEN.items():
            (running.folder / "policies" / "apps" / f"{app}.yaml").write_text(STREAMED + caps)
        await watching.look()
        await watching.look()
        assert running.gateway.policy.digest != digest
        reloaded_at = time.time()

        def topped_up() -> bool:
            with connect.reading(running.folder / "gateway.db") as db:
                found = db.execute("SELECT DISTINCT call_id FROM entries WHERE kind = 'extend' AND at > $1", (reloaded_at,)).fetchall()
                return len(found) == len(CAPS_THEN)

        await until(topped_up)
        await streams.aclose()
        await running.quiet()
        with connect.reading(running.folder / "gateway.db") as db:
            assert findings(db) == []
        api.behaviour = Behaviour()
        for app in CAPS_THEN:
            with pytest.raises(anthropic.RateLimitError, match="session s1 of app") if app in ("added", "lowered") else contextlib.nullcontext():
                await running.client(app).messages.create(**asked | {"max_tokens": 9})


def changed(folder: Path, begins: str) -> list[str]:
    """The lines of all audited changes that begin so, the newest first."""
    with connect.reading(folder / "gateway.db") as db:
        return [line for change in admin.policy_changes(db, 100) for line in change.diff.splitlines() if line.startswith(begins)]


@pytest.mark.parametrize("saves", [45, pytest.param(200, marks=pytest.mark.soak)])
async def test_storm_of_saves_shows_no_call_half_a_policy(tmp_path: Path, saves: int):
    """In a storm of saves no call meets half a policy, and none is dropped."""
    outcomes: list[tuple[str, int, str]] = []
    over = asyncio.Event()

    async def caller(running: Running, model: str, max_tokens: int) -> None:
        client = running.client()
        while not over.is_set():
            outcomes.append((model, max_tokens, await outcome(client, model, max_tokens)))

    async with Simulator() as api, gateway(tmp_path, api, {"app": FIRST}) as running, watched(running) as file:

        def loaded() -> bool:
            return running.gateway.policy.digest == load(running.folder / "policies").digest

        callers = [caller(running, model, tokens) for model in ("claude-haiku-4-5", "claude-sonnet-5") for tokens in (100, 200)]
        calling = asyncio.gather(*callers)
        for number in range(saves):
            text = (FIRST, SECOND, BROKEN)[number % 3] + f"# {number}\n"
            if number % 2:
                file.write_text(text)
            else:
                (file.parent / ".new").write_text(text)
                os.replace(file.parent / ".new", file)
            await asyncio.sleep(LOOK_EVERY_S / 4)
            if number % 15 == 1:  # a good one: on a busy machine the storm would otherwise pass between two looks
                await until(loaded)
        file.write_text(SECOND + "# the last\n")
        await until(loaded)
        over.set()
        await calling
        await running.quiet()
        answered = [each for each in outcomes if each[2] == "answered"]
        assert len((await api.settled()).messages()) == len(answered), "none was dropped between here and the API"
        with connect.reading(ledger_path(f"sqlite:///{running.folder / 'gateway.db'}")) as db:
            changes = admin.policy_changes(db, 1000)
    assert {each[:2] for each in answered} == {("claude-haiku-4-5", 100), ("claude-sonnet-5", 100), ("claude-sonnet-5", 200)}
    assert {each[2] for each in outcomes} == {"answered", "model", "max_tokens"}, "every call had one whole answer"
    assert len(changes) >= 4
    assert not any("+caps: {mnth" in change.diff for change in changes), "no broken policy ever came into force"


@pytest.mark.parametrize("engine", ENGINES)
async def test_gateway_with_another_calendar_does_not_start(tmp_path: Path, engine: str):
    """Each moved all past calls to its own days, whenever it started."""
    path = new_ledger(tmp_path, engine)
    first = await Ledger.open(url(path))
    await must_agree(first, SimpleNamespace(timezone="Europe/Berlin"))  # alone it may
    second = await Ledger.open(url(path))
    try:
        await must_agree(second, SimpleNamespace(timezone="UTC"))
        with pytest.raises(LedgerUnavailable, match=rf"begin by UTC, and 1 other .*{first.owner}.*says Europe/Berlin: write the same one"):
            await must_agree(second, SimpleNamespace(timezone="Europe/Berlin"))
        await first.close()
        await must_agree(second, SimpleNamespace(timezone="Europe/Berlin"))
    finally:
        await second.close()
