"""`gateway demo`: the whole thing on this machine, with no account; exit code 0 only if every figure adds up."""

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from gateway_addon.cli.common import FINE, PROBLEM, says_errors
from gateway_addon.cli.report import report
from gateway_addon.demo import proof
from gateway_addon.demo.proof import Finding, Pair
from gateway_addon.demo.scenes import SCENES, Surprise
from gateway_addon.demo.stage import APPS, GatewayFailed, Stage, staged
from gateway_addon.ledger import LedgerUnavailable, connect
from gateway_addon.ledger.maintenance.invariants import findings
from gateway_addon.ledger.reports import entry_history
from gateway_addon.names import PROGRAM
from gateway_addon.policy import caps, load

WIDTH = 110


@click.command(epilog=f"Example: {PROGRAM} demo")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON instead of telling the story.")
@click.option("--keep", is_flag=True, help="Keep the folder with its policies, ledger and log, to look around in.")
@click.pass_context
@says_errors(GatewayFailed, LedgerUnavailable, OSError)
def demo(ctx: click.Context, as_json: bool, keep: bool) -> None:
    """See the whole thing work: a simulated Claude API, three apps, refusals, a reached cap, a report, and the proof that
    the gateway's ledger and the API's own book say the same, to the nano-dollar.

    Needs no account and no network. Exits 1 if anything does not add up.
    """
    began = time.monotonic()
    story = _Story(quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="gateway-demo-", delete=not keep) as temporary:
        folder = Path(temporary)
        try:
            pairs, found = asyncio.run(_play(folder, story))
        except Surprise as surprise:
            story.line(f"That should not have happened: {surprise}")
            sys.exit(PROBLEM)
        if as_json:
            click.echo(json.dumps(_document(pairs, found), indent=2))
        else:
            story.title(f"The report ({PROGRAM} report)")
            ctx.invoke(report, since="1h", ledger=f"sqlite:///{folder / 'gateway.db'}")
            _show_proof(story, pairs, found)
            story.ending(all(finding.holds for finding in found), time.monotonic() - began, folder if keep else None)
    sys.exit(FINE if all(finding.holds for finding in found) else PROBLEM)


async def _play(folder: Path, story: "_Story") -> tuple[list[Pair], list[Finding]]:
    """Play every scene, and then the proof."""
    story.title("The stage")
    async with staged(folder) as stage:
        story.line(f"A simulated Claude API, with a book of its own, at {stage.api.url}.")
        story.line(f"The gateway, a process like any other ({PROGRAM} serve), at {stage.url}. It alone has the API's key.")
        story.line(f"Three apps, each with a token of its own: {', '.join(APPS)}.")
        with story.progress() as advance:
            for title, scene in SCENES:
                advance(title)
                await scene(stage, story.line)
        async with asyncio.timeout(10):
            await stage.api.settled()
        await stage.stop()
        return _prove(stage)


def _prove(stage: Stage) -> tuple[list[Pair], list[Finding]]:
    policy = load(stage.folder / "policies")
    limits = {cap for app in policy.apps.values() for cap in caps(policy, app)}
    with connect.reading(stage.ledger) as db:
        calls, levels, wrong = entry_history.forwarded(db), entry_history.high_water(db), findings(db)
    book = stage.api.book.all()
    both = proof.pairs(calls, book)
    return both, [
        proof.same_calls(both),
        proof.exact(both),
        proof.estimated(both),
        proof.nothing_else(calls, book),
        proof.one_key(book, stage.api.key),
        proof.no_cap_passed(limits, levels),
        proof.sound(wrong),
    ]


def _show_proof(story: "_Story", pairs: list[Pair], found: list[Finding]) -> None:
    story.title("The proof: the gateway's ledger beside the API's own book")
    for finding in found:
        story.line(finding.sentence, "ok  " if finding.holds else "BAD ")


def _document(pairs: list[Pair], found: list[Finding]) -> dict[str, object]:
    calls = [
        {
            "request_id": pair.request_id,
            "app": pair.call and pair.call.app,
            "model": pair.billed and pair.billed.model_served,
            "ledger_nano": pair.call and pair.call.spent_nano,
            "book_nano": pair.billed and pair.billed.billed_nano,
            "flags": list(pair.call.flags) if pair.call else [],
        }
        for pair in pairs
    ]
    return {"holds": all(finding.holds for finding in found), "findings": [finding._asdict() for finding in found], "calls": calls}


class _Story:
    """The narration: titles and wrapped lines on stdout; on a terminal a progress bar stands below them while a scene runs."""

    def __init__(self, *, quiet: bool):
        self.quiet = quiet
        self.live = sys.stdout.isatty() and not quiet

    def title(self, text: str) -> None:
        self._say(f"\n{click.style(text, bold=True)}")

    def line(self, text: str, mark: str = "") -> None:
        width = min(WIDTH, shutil.get_terminal_size().columns if self.live else WIDTH)
        self._say(click.wrap_text(text, width, initial_indent=f"  {mark}", subsequent_indent="  " + " " * len(mark)))

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Yield a function that moves the bar on to the scene of a title."""
        with click.progressbar(length=len(SCENES), hidden=not self.live, show_eta=False, show_pos=True, show_percent=False) as bar:
            done = 0

            def advance(title: str) -> None:
                nonlocal done
                self.title(title)
                bar.label = "  "
                bar.update(done and 1)
                done += 1

            yield advance
            bar.update(1)

    def ending(self, holds: bool, took_s: float, kept: Path | None) -> None:
        self._say("")
        if not holds:
            self.line("The figures do not add up: the lines marked BAD say where.")
            return
        self.line(f"Every figure adds up ({took_s:.0f} s). For a gateway of your own: {PROGRAM} init, then {PROGRAM} serve.")
        if kept:
            self.line(f"Kept for you to look at: {kept}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            click.echo(f"\r\x1b[K{text}" if self.live else text)
