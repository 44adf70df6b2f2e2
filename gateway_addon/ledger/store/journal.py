"""Keep the ends of calls on this machine's disk while the ledger's server cannot take them.

Promises that an end for which `keep` returned True survives the process and a power cut, in a private file of at most `BYTES_MAX`;
that a line torn by a crash is left out and no other; and that a dead process's file is found, a living one's never. A file exists only
while something in it is unwritten, and belongs to its process by a lock that the operating system releases.
Knows nothing of SQL.
"""

import contextlib
import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gateway_addon.ledger.types import Outcome, PartShape, RecordedEnd, Settlement

log = logging.getLogger(__name__)

BYTES_MAX = 16 * 2**20  # some 20,000 calls: no more are in flight when a server goes, and none is admitted while it is away


class Journal:
    """One process's journal, in a folder that this machine's processes on one ledger share. The first `keep` makes the file."""

    def __init__(self, folder: Path, owner: str) -> None:
        self._path = folder / f"{owner}.jsonl"
        self._file: int | None = None
        self._size_bytes = 0
        self._told = False

    def __str__(self) -> str:
        return str(self._path)

    @property
    def possible(self) -> bool:
        """Return whether the file could be made, as the folders are now."""
        nearest = next(folder for folder in self._path.parents if folder.exists())
        return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)

    def keep(self, endings: Sequence[RecordedEnd]) -> bool:
        """Append ends, durably. False, logged once, where the disk does not take them: then they are in memory alone."""
        lines = b"".join(map(_line, endings))
        try:
            if self._size_bytes + len(lines) > BYTES_MAX:
                raise OSError(f"it is full ({BYTES_MAX:,} bytes)")
            file = self._open()
            try:
                _write(file, lines)
            except OSError:
                os.ftruncate(file, self._size_bytes)
                raise
        except OSError as error:
            if not self._told:
                log.error("the journal %s takes no more (%s): settlements wait in memory until the ledger is back", self, error)
            self._told = True
            return False
        self._size_bytes += len(lines)
        return True

    def clear(self) -> None:
        """Empty the journal: all of it is in the ledger."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
        self._file, self._size_bytes, self._told = None, 0, False

    def _open(self) -> int:
        if self._file is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = _locked_new(self._path)
            sync_folder(self._path.parent)
        return self._file


@dataclass(frozen=True, slots=True)
class LeftJournal:
    """The journal of a dead process. Open, so that no other process takes it up as well."""

    path: Path
    endings: tuple[RecordedEnd, ...]
    damaged: bool
    """True if a line in the middle cannot be read: no crash of ours does that."""

    def done(self, unknown: int) -> None:
        """Remove a journal that is written; set it aside for a person if a part is not understood."""
        if not (self.damaged or unknown):
            self.path.unlink(missing_ok=True)
            return
        aside = self.path.with_suffix(".unread")
        self.path.replace(aside)
        log.error("%s: %d calls are not in this ledger%s", aside, unknown, ", and a line cannot be read" if self.damaged else "")


@contextlib.contextmanager
def unwritten_journals(folder: Path) -> Iterator[list[LeftJournal]]:
    """Hold the journals in a folder whose processes are gone, for as long as the block lasts."""
    with contextlib.ExitStack() as held:
        found = []
        for path in sorted(folder.glob("*.jsonl")):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                file = held.enter_context(open(path, "rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_nlink:  # or another process has just dealt with it
                    found.append(LeftJournal(path, *read(file.read())))
        yield found


def read(data: bytes) -> tuple[tuple[RecordedEnd, ...], bool]:
    """Return the ends in a journal, and whether a whole line is damaged. Bytes after the last line's end were being written."""
    whole = data.split(b"\n")[:-1]
    endings = tuple(ending for line in whole if (ending := _ending(line)) is not None)
    return endings, len(endings) < len(whole)


@dataclass(frozen=True, slots=True)
class _Tokens:
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int
    cache_write_unsplit_tokens: int


@dataclass(frozen=True, slots=True)
class _Part:
    kind: str
    model: str | None
    tokens: _Tokens
    web_searches: int
    nano: int
    price_row: str | None


def _line(ending: RecordedEnd) -> bytes:
    settlement = ending.settlement
    values = {
        "kind": ending.kind,
        "call_id": ending.call_id,
        "owner": ending.owner,
        "at": ending.at,
        "cost_nano": settlement.cost_nano,
        "parts": [_shown(part) for part in settlement.parts],
        "outcome": asdict(settlement.outcome),
    }
    text = json.dumps(values, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _shown(part: PartShape) -> dict[str, Any]:
    """Return a part by the names that its readers know, whatever its class."""
    tokens = {each.name: getattr(part.tokens, each.name) for each in fields(_Tokens)}
    return {each.name: getattr(part, each.name) for each in fields(_Part)} | {"tokens": tokens}


def _ending(line: bytes) -> RecordedEnd | None:
    """Parse a line; None where it is damaged, or was written by a later version."""
    check, _, text = line.partition(b" ")
    if check != b"%08x" % zlib.crc32(text):
        return None
    try:
        values = json.loads(text)
        parts = tuple(_Part(**{**part, "tokens": _Tokens(**part["tokens"])}) for part in values["parts"])
        outcome = Outcome(**{**values["outcome"], "flags": tuple(values["outcome"]["flags"])})
        settlement = Settlement(values["cost_nano"], parts, outcome)
        return RecordedEnd(values["kind"], values["call_id"], values["owner"], settlement, values["at"])
    except (KeyError, TypeError, ValueError):
        return None


def _locked_new(path: Path) -> int:
    """Make a new file and lock it. A process that looks for dead ones may take it before the lock: then try again."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
