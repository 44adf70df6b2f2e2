"""The bound of a running stream, held against providers that keep their declared pace in every awkward way."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_addon.calls.progress import BLOCK_TOKENS, TICK_S, Pace, Progress, Seen, TurnProgress

PACE = Pace(tokens_per_second_max=400, lag_s=5.0, turn_s_min=2.0)


def provider(seed, *, may_think):
    """A stream as (time, what it has shown, what it has generated): no faster than the pace, no later than half the lag."""
    chance = random.Random(seed)
    now, generated, shown_bytes, blocks, events, seen = 1000.0, 0, 0, 0, 0, []
    delay_s = chance.uniform(0, PACE.lag_s / 2)
    for _ in range(chance.randint(1, 6)):
        if may_think and chance.random() < 0.6:  # thinking: generated, and not shown, or only in a summary
            took = chance.uniform(0, 20)
            now += took
            generated += int(took * chance.uniform(0, PACE.tokens_per_second_max))
            blocks += chance.randint(0, 1)
            seen.append((now + delay_s, Seen(shown_bytes, blocks, events, False, 0), generated))
        blocks += 1
        for _ in range(chance.randint(1, 12)):
            took = chance.uniform(0, 2)
            now += took
            tokens = int(took * chance.uniform(0, PACE.tokens_per_second_max))
            generated += tokens
            shown_bytes += tokens * chance.randint(1, 5)  # a token is at least a byte
            events += 1
            seen.append((now + delay_s, Seen(shown_bytes, blocks, events, True, 0), generated))
        seen.append((now + delay_s, Seen(shown_bytes, blocks, events, False, 0), generated))
    return seen


@pytest.mark.parametrize("may_think", [False, True], ids=["plain", "thinking"])
@pytest.mark.parametrize("seed", range(40))
def test_generated_tokens_never_pass_the_bound_at_pace(seed, may_think):
    """A provider that keeps its declared pace has never generated more than the bound."""
    progress = Progress(PACE, 10**9, may_think, content_monotonic_s=1000.0)
    for at, seen, generated in provider(seed, may_think=may_think):
        assert progress.tokens_at(at) >= generated, "a moment before the chunk arrives"
        progress.observe(seen, at)
        assert progress.tokens_at(at) >= generated, "a moment after"


def test_without_hidden_thinking_in_the_bound_it_would_be_passed():
    """The guard of `may_think`: take it away, and the property above fails for some stream."""
    passed = 0
    for seed in range(40):
        progress = Progress(PACE, 10**9, False, content_monotonic_s=1000.0)
        for at, seen, generated in provider(seed, may_think=True):
            progress.observe(seen, at)
            passed += progress.tokens_at(at) < generated
    assert passed


def late(stream, seed):
    """The stream as somebody reads it who stands still now and then: (time of reading, time unread so far, seen, generated).

    What came meanwhile is read at once, piece by piece, as soon as reading goes on.
    """
    chance = random.Random(seed)
    begins = sorted(chance.uniform(1000, stream[-1][0]) for _ in range(3))
    stops, free_at = [], 0.0
    for begin in begins:
        begin = max(begin, free_at)
        free_at = begin + chance.uniform(1, 30)
        stops.append((begin, free_at))
    for at, seen, generated in stream:
        read_at = next((end for begin, end in stops if begin <= at < end), at)
        yield read_at, sum(min(end, read_at) - begin for begin, end in stops if begin < read_at), seen, generated


def passed(seed, *, may_think, counts_unread):
    """How often the bound of a stream that is read late is below what was generated when its last piece was read."""
    progress, stream = Progress(PACE, 10**9, may_think, content_monotonic_s=1000.0), provider(seed, may_think=may_think)
    found = 0
    for read_at, unread_s, seen, _ in late(stream, seed):
        progress.observe(seen, read_at, unread_s if counts_unread else 0.0)
        ahead = max((made for at, _, made in stream if at <= read_at), default=0)  # generated, though perhaps not read yet
        found += progress.tokens_at(read_at) < ahead
    return found


@pytest.mark.parametrize("may_think", [False, True], ids=["plain", "thinking"])
def test_time_in_which_nobody_read_is_generating_time(may_think):
    assert not any(passed(seed, may_think=may_think, counts_unread=True) for seed in range(200))


def test_without_unread_time_in_the_bound_it_would_be_passed():
    """The guard of `unread_s`: a late piece would take the time back in which nobody read."""
    assert any(passed(seed, may_think=False, counts_unread=False) for seed in range(200))


def test_a_chunk_proves_no_more_in_parts_than_whole():
    """Twenty seconds of thinking that is not shown, then text: the block's opening and its first words together, or one after the other."""
    opening, words = Seen(0, 1, 0, True, 0), Seen(10, 1, 1, True, 0)
    for parts in [(words,), (opening, words)]:
        progress = Progress(PACE, 10**9, True, content_monotonic_s=1000.0)
        for each in parts:
            progress.observe(each, 1020.0)
        assert progress.tokens_at(1020.0) == 10 + BLOCK_TOKENS + PACE.tokens_in(20 + PACE.lag_s)


@pytest.mark.parametrize("granted", [0, 100, 2_000, 4_400, 100_000])
@pytest.mark.parametrize("shown", [Seen(), Seen(1_000, 2, 5, True, 0), Seen(0, 0, 0, False, 9_000)])
def test_a_grant_ends_when_the_bound_passes_it(granted, shown):
    """A grant ends at the moment at which the bound passes it."""
    progress = Progress(PACE, 128_000, False, content_monotonic_s=1000.0)
    progress.observe(shown, 1000.0)
    ends = progress.covered_until(granted)
    assert progress.tokens_at(ends - 0.01) <= max(granted, progress.tokens_at(1000.0))
    assert progress.tokens_at(ends + 0.01) > granted


def test_a_grant_of_max_tokens_never_ends():
    progress = Progress(PACE, 500, True, content_monotonic_s=1000.0)
    assert progress.covered_until(500) == math.inf
    assert progress.tokens_at(10**9) == 500


def test_reported_usage_counts_where_it_exceeds_what_was_shown():
    """Usage that the API reports counts where it is more than the stream has shown."""
    progress = Progress(PACE, 10**6, False, content_monotonic_s=1000.0)
    progress.observe(Seen(10, 1, 1, True, 7_000), 1000.0)
    assert progress.tokens_at(1000.0) == 7_000 + PACE.tokens_in(PACE.lag_s)
    progress.observe(Seen(9_000, 1, 2, True, 7_000), 1000.0)
    assert progress.tokens_at(1000.0) == 9_000 + BLOCK_TOKENS + PACE.tokens_in(PACE.lag_s)


def test_first_grant_outlasts_the_first_top_up_by_a_lag():
    """The first grant lasts until the first top up and a lag beyond."""
    progress = Progress(PACE, 10**6, False, content_monotonic_s=1000.0)
    assert progress.tokens_wanted(PACE.first_tokens, 1000.0 - 0.01) == 0
    wanted = progress.tokens_wanted(PACE.first_tokens, 1000.0 + TICK_S)
    assert wanted > 0
    assert progress.covered_until(PACE.first_tokens + wanted) >= 1000.0 + 2 * TICK_S + PACE.lag_s


@pytest.mark.parametrize("seed", range(200))
def test_turns_never_pass_their_bound(seed):
    """A provider that uses its tools as fast as declared, and delivers as late and as lumpily as declared, or all in one piece."""
    chance = random.Random(seed)
    count, late = chance.randint(2, 11), chance.random() < 0.3
    begins, uses, texts, at_s = [0.0], [], [], 0.0
    for _ in range(count - 1):  # each turn: text, then a use of a tool, then the next turn
        use_s = at_s + PACE.turn_s_min * chance.choice([1.0, 1.0, chance.uniform(1, 4)])
        texts += [chance.uniform(at_s, use_s) for _ in range(3)]
        uses.append(use_s)
        begins.append(use_s)
        at_s = use_s
    texts += [at_s + chance.uniform(0, 20) for _ in range(5)]
    made = sorted([(s, False) for s in texts] + [(s, True) for s in uses])
    turns, seen, delivered_s, end_s = TurnProgress(PACE, count, 1000.0), Seen(), 0.0, at_s + 20
    cut_lag_s = PACE.lag_s / 2
    for made_s, is_use in made:
        if late:
            break
        arrives_s = max(delivered_s, made_s + chance.choice([0.0, chance.uniform(0, PACE.lag_s - cut_lag_s)]))
        for look_s in (delivered_s, chance.uniform(delivered_s, arrives_s), arrives_s):
            run = sum(begin <= look_s + cut_lag_s for begin in begins)
            assert turns.turns_at(1000.0 + look_s) >= run, (seed, look_s)
        delivered_s = arrives_s
        seen = replace(seen, tool_uses=seen.tool_uses + is_use, content_events=seen.content_events + (not is_use), visible_open=not is_use)
        turns.observe(seen, 1000.0 + arrives_s)
    for look_s in (delivered_s + chance.uniform(0, end_s) for _ in range(20)):
        run = sum(begin <= look_s + cut_lag_s for begin in begins)
        assert turns.turns_at(1000.0 + look_s) >= run, (seed, look_s)


def test_turns_are_counted_by_uses_shown_and_by_the_clock():
    turns = TurnProgress(PACE, 9, 1000.0)
    assert [turns.turns_at(1000.0 + s) for s in (0, 1, 1.1, 3, 3.1, 13, 99)] == [3, 3, 4, 4, 5, 9, 9]
    turns.observe(Seen(tool_uses=1, content_events=1, visible_open=True), 1004.0)
    assert [turns.turns_at(1004.0 + s) for s in (0, 1, 1.1)] == [4, 4, 5]
    turns.observe(Seen(tool_uses=1, content_events=2, visible_open=True), 1014.0)
    assert turns.turns_at(1014.0) == 5, "text shows that the second turn has used nothing until then; it may have the next moment"
    turns.observe(Seen(tool_uses=1, content_events=9, visible_open=False), 1019.0)
    assert turns.turns_at(1019.0) == 7, "thinking shows nothing"
    turns.observe(Seen(tool_uses=3, content_events=9), 1020.0)
    assert turns.turns_at(1020.0) == 6, "two uses in one turn count as two"


def test_time_in_which_nobody_read_is_time_for_turns():
    turns = TurnProgress(PACE, 9, 1000.0)
    turns.observe(Seen(tool_uses=1), 1004.0, unread_s=2.0)
    assert turns.turns_at(1004.0) == 1 + 4


@given(st.integers(0, 6), st.floats(0, 60), st.floats(0, 60), st.integers(1, 9))
def test_a_grant_of_turns_lasts_exactly_as_long_as_it_says(uses, use_s, text_s, granted):
    turns = TurnProgress(PACE, 9, 1000.0 + use_s, 1000.0 + text_s, Seen(tool_uses=uses))
    until = turns.covered_until(granted)
    if until == math.inf:
        assert granted == 9
    else:
        assert turns.turns_at(until - 0.001) <= granted
        assert turns.turns_at(until + 0.001) > granted


def test_a_grant_of_turns_is_asked_for_ahead_of_need():
    turns = TurnProgress(PACE, 9, 1000.0)
    assert PACE.first_turns == 4
    wanted = turns.turns_wanted(PACE.first_turns, 1000.0)
    assert wanted == 1, "one use more than the clock allows, so that two at once are no cut"
    assert turns.covered_until(PACE.first_turns + wanted) >= 1000.0 + 2 * TICK_S
    assert turns.turns_wanted(9, 1000.0) == 0
