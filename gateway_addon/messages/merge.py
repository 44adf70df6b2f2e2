"""Merge the JSON objects of one answer into one `Usage`. Pure; never raises on content.

The rules, each learnt from recorded responses (reference: platform documentation, "Streaming messages" and "Usage"):
- counts are running totals: the highest reported one holds, so that a zero or null in a later event never erases it, and nothing is
  added up; but beside `iterations`, which are the bill, the top level speaks of the last turn alone, and may fall;
- the `output_tokens` of a message_start are a placeholder, neither a floor nor a count: the first later number replaces them;
- usage may come with message_start, with message_delta, or with both;
- a message_start with a stop reason is the whole message (programmatic tool calls): content and usage are in it, no delta follows;
- service tier, speed, region and the 5m/1h split come with the first usage object only, and are kept;
- a count that is not a whole number >= 0 is not understood: the usage is then unreadable, never guessed;
- the served model is the message's, unless a fallback block or a fallback_message iteration names another;
- unknown keys, blocks and iteration kinds are no error;
- a name is the provider's to choose, and is kept as names are (names.py).
"""

from typing import NamedTuple

from gateway_addon.messages.usage import TokenCounts, Usage, UsagePart
from gateway_addon.names import safe_name

_COUNT_MAX = 10**12  # no call comes near; what is larger could overflow the ledger's integers
_COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_NESTED_COUNTS = {
    "cache_creation": ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"),
    "server_tool_use": ("web_search_requests", "web_fetch_requests", "code_execution_requests"),
}
_NAMES = ("service_tier", "speed", "inference_geo")


class _Iteration(NamedTuple):
    """One entry of `usage.iterations`, as far as it has been counted."""

    kind: str
    model: str | None
    counts: dict[str, int]

    def part(self) -> UsagePart:
        return UsagePart(self.kind, self.model, _tokens(self.counts))


class Draft:
    """An answer as far as it has been seen. Give it the objects in the order in which they come."""

    __slots__ = ("_asked", "_counts", "_iterations", "_names", "_notes", "_output_is_placeholder", "_served", "_unreadable",
                 "code_executed", "complete", "error_type", "fallback", "has_content", "message_id", "started", "stop_reason")  # fmt: skip

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._output_is_placeholder = False
        self._iterations: list[_Iteration] = []
        self._asked: str | None = None
        self._served: str | None = None
        self._unreadable = False
        self._notes: list[str] = []
        self.started = False
        self.complete = False
        self.has_content = False
        self.code_executed = False
        self.fallback = False
        self.stop_reason: str | None = None
        self.error_type: str | None = None
        self.message_id: str | None = None

    @property
    def output_tokens(self) -> int:
        return self._counts.get("output_tokens", 0)

    def note(self, sentence: str) -> None:
        if sentence not in self._notes:
            self._notes.append(sentence)

    def not_understood(self, sentence: str) -> None:
        self._unreadable = True
        self.note(sentence)

    def message_start(self, message: object) -> None:
        """Take a stream's opening, which may be the whole message. A second one, which a middleman sent, is merged."""
        if not isinstance(message, dict):
            return self.not_understood("message_start carries no message")
        if self.started:
            self.note("message_start came twice")
        placeholder = self._output_is_placeholder or not self.started
        self._open(message)
        self._output_is_placeholder = placeholder
        if _name(message.get("stop_reason")):
            self._finish(message)

    def message_delta(self, event: dict[str, object]) -> None:
        """Take a stream's running totals. An event without usage changes nothing."""
        delta = event.get("delta")
        if isinstance(delta, dict):
            self.stop_reason = _name(delta.get("stop_reason")) or self.stop_reason
            self.complete = self.complete or (self.started and self.stop_reason is not None)
            self._container(delta)
        if event.get("usage") is not None:
            self._usage(event["usage"])

    def block(self, block: object) -> None:
        """Take a content block: only the presence of content, a change of model and code that ran count."""
        if not isinstance(block, dict):
            return
        kind = block.get("type")
        if kind == "fallback":
            to = block.get("to")
            self.fallback = True
            self._served = (_name(to.get("model")) if isinstance(to, dict) else None) or self._served
        elif kind != "text" or block.get("text"):
            self.has_content = True
        if isinstance(kind, str) and kind.endswith("code_execution_tool_result"):
            self.code_executed = True

    def message(self, message: dict[str, object]) -> None:
        """Take a whole JSON answer."""
        self._open(message)
        self._finish(message)

    def _open(self, message: dict[str, object]) -> None:
        self.started = True
        self._asked = _name(message.get("model")) or self._asked
        self.message_id = _name(message.get("id")) or self.message_id
        self._container(message)
        if message.get("usage") is not None:
            self._usage(message["usage"])

    def _finish(self, message: dict[str, object]) -> None:
        """Take the content and the stop reason of a message that is whole."""
        content = message.get("content")
        if isinstance(content, list):
            for block in content:
                self.block(block)
        else:
            self.has_content = True  # not the shape that we know: do not take it for a refusal that is free
        self.stop_reason = _name(message.get("stop_reason"))
        self._output_is_placeholder = False
        self.complete = True

    def error(self, envelope: dict[str, object]) -> None:
        """Take the API's error envelope, as a whole body or as an event in mid-stream."""
        error = envelope.get("error")
        kind = (_name(error.get("type")) if isinstance(error, dict) else None) or "error"
        self.error_type = kind.replace(" ", "_")  # it becomes one of a call's flags, which spaces part

    def usage(self) -> Usage:
        """Return the usage seen so far."""
        counts = self._counts
        readable = not self._unreadable and "input_tokens" in counts and "output_tokens" in counts
        if self.started and self.complete and not counts:
            self.note("the answer carries no usage object")
        return Usage(
            model=self._served or self._asked,
            tokens=_tokens(counts),
            iterations=tuple(each.part() for each in self._iterations),
            web_search_requests=counts.get("web_search_requests", 0),
            web_fetch_requests=counts.get("web_fetch_requests", 0),
            code_execution_requests=counts.get("code_execution_requests", 0),
            service_tier=self._names.get("service_tier"),
            speed=self._names.get("speed"),
            inference_geo=self._names.get("inference_geo"),
            fallback_credit=self._names.get("fallback_credit"),
            stop_reason=self.stop_reason,
            error_type=self.error_type,
            message_id=self.message_id,
            readable=readable,
            complete=self.complete,
            started=self.started,
            refused_before_output=self.stop_reason == "refusal" and not self.has_content,
            fallback=self.fallback,
            code_executed=self.code_executed or counts.get("code_execution_requests", 0) > 0,
            notes=tuple(self._notes),
        )

    def _usage(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return self.not_understood("usage is not an object")
        counts = self._numbers(usage, "usage")
        fall = set(_COUNTS) if usage.get("iterations") else {"output_tokens"} if self._output_is_placeholder else set()
        self._counts = _highest(self._counts, counts) | {name: counts[name] for name in fall & counts.keys()}
        self._output_is_placeholder = self._output_is_placeholder and "output_tokens" not in counts
        for name in _NAMES:
            if value := _name(usage.get(name)):
                self._names[name] = value
        credit = usage.get("fallback_credit")
        status = credit.get("status") if isinstance(credit, dict) else None
        if isinstance(status, dict) and (value := _name(status.get("type"))):
            self._names["fallback_credit"] = value
        if usage.get("iterations") is not None:
            self._take_iterations(usage["iterations"])

    def _take_iterations(self, entries: object) -> None:
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return self.not_understood("usage.iterations is not a list of objects")
        for index, entry in enumerate(entries):
            counts = self._numbers(entry, f"usage.iterations[{index}]")
            if "input_tokens" not in counts or "output_tokens" not in counts:
                self.not_understood(f"usage.iterations[{index}] lacks its token counts")
            kind = _name(entry.get("type")) or "unknown"
            model = _name(entry.get("model")) or (None if kind == "advisor_message" else self._asked)
            before = self._iterations[index : index + 1]
            if before and (before[0].kind, before[0].model) == (kind, model):
                counts = _highest(before[0].counts, counts)
            self._iterations[index : index + 1] = [_Iteration(kind, model, counts)]
        fallbacks = [each for each in self._iterations if each.kind == "fallback_message"]
        if fallbacks:
            self.fallback = True
            self._served = fallbacks[-1].model or self._served

    def _numbers(self, usage: dict[str, object], where: str) -> dict[str, int]:
        """Return the counts that are present, flat by name. `where` names the object in a note about a count not understood."""
        found = {name: usage[name] for name in _COUNTS if usage.get(name) is not None}
        for parent, names in _NESTED_COUNTS.items():
            child = usage.get(parent)
            if isinstance(child, dict):
                found |= {name: child[name] for name in names if child.get(name) is not None}
        counts = {}
        for name, value in found.items():
            if type(value) is int and 0 <= value <= _COUNT_MAX:
                counts[name] = value
            else:
                self.not_understood(f"{where}: {name} is not a count of tokens")
        return counts

    def _container(self, message: dict[str, object]) -> None:
        if message.get("container") is not None:
            self.code_executed = True


def _name(value: object) -> str | None:
    return safe_name(value) if isinstance(value, str) and value else None


def _highest(before: dict[str, int], counts: dict[str, int]) -> dict[str, int]:
    """Merge two states of the same running totals."""
    return before | {name: max(count, before.get(name, 0)) for name, count in counts.items()}


def _tokens(counts: dict[str, int]) -> TokenCounts:
    """Return the token counts. The cache split lags the total and never exceeds it in any recording: the rest is tokens too."""
    five_minutes, hour = (counts.get(name, 0) for name in _NESTED_COUNTS["cache_creation"])
    return TokenCounts(
        input_tokens=counts.get("input_tokens", 0),
        output_tokens=counts.get("output_tokens", 0),
        cache_read_tokens=counts.get("cache_read_input_tokens", 0),
        cache_write_5m_tokens=five_minutes,
        cache_write_1h_tokens=hour,
        cache_write_unsplit_tokens=max(0, counts.get("cache_creation_input_tokens", 0) - five_minutes - hour),
    )
