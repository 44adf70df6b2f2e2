"""How gateways have gone wrong, and where it is tested that this one does not: a map for readers, held to the tests that it names.

Each row: what went wrong (somewhere, with somebody's money or key), and the tests that would fail if it went wrong here. For a way around the
allowlist the trick of the bypass table is named as well: its rows are tried on the pure functions and over a raw socket.
"""

import ast
from pathlib import Path

from bypass import HOSTILE

CROWD = "ledger/test_crowd: a_crowd_over_many_gateways_never_passes_one_cap"
BYPASS = "messages/test_hostile_requests: a_hostile_request_is_refused"
SOCKET = "proxy/test_wire: no_hostile_request_of_the_table_reaches_the_api"

SPENDING = {
    "many calls pass a budget at once, because each looked before any had spent": [CROWD, "ledger/test_reservations: many_callers_never_pass_a_cap_and_use_it_up"],
    "the same budget once for every process": [CROWD, "ledger/store/test_locks: processes_share_one_cap_and_use_it_up"],
    "a reservation that forgets the prompt, or a tier that the request can reach": ["calls/test_quote: no_answer_to_a_plain_request_costs_more_than_its_quote", "calls/test_quote: the_rate_is_the_dearest_that_the_request_can_reach"],
    "the one call that crosses a budget is let through by design": ["ledger/test_reservations: a_call_larger_than_a_whole_window_is_told_so", "calls/test_guards: the_where_of_the_reservation_keeps_the_cap"],
    "reservations that leak, until an app without spending is locked out": [CROWD, "calls/test_endings: client_that_leaves_is_charged_at_least_the_bill"],
    "a settlement that counts twice": ["ledger/test_reservations: a_call_resolves_once", "calls/test_guards: the_unique_index_keeps_a_call_from_being_resolved_twice"],
    "enforcement and report that disagree": ["cli/test_report: a_report_sums_to_what_the_caps_are_judged_by", "ledger/test_reservations: any_sequence_keeps_the_caps_and_the_sums"],
    "a call answered without a price counts as free": ["pricing/test_costing: what_cannot_be_priced_is_none_and_never_zero", "calls/test_endings: the_answering_model_is_charged_not_the_asked_one"],
    "a killed process whose calls are forgotten": ["ledger/test_crash: a_killed_gateway_loses_no_spend_and_frees_none", "calls/test_guards: the_sweep_settles_what_a_dead_process_held"],
    "calls pass because the ledger cannot be written": ["calls/test_ledger_outages: failing_ledger_refuses_calls_until_it_is_back"],
    "a hook that fails and lets the call go on": ["proxy/test_hooks_failing: a_failure_on_the_way_in_sends_nothing", "calls/test_guards: the_wrapper_of_a_hook_keeps_a_failure_from_forwarding"],
    "a stream that outruns its cap while a clock steps, the process stands still or its client is slow": ["calls/test_top_ups: a_clock_set_back_an_hour_does_not_pace_a_stream", "calls/test_top_ups: time_that_the_loop_lost_is_generating_time", "proxy/test_backpressure: slow_readers_are_booked_at_what_is_generated"],
    "a stream that is left costs all that it asked for": ["calls/test_endings: a_stream_that_is_left_is_booked_by_then", "calls/test_settlement: a_loop_that_is_left_keeps_what_is_held"],
    "an unknown model at no price": ["pricing/test_costing: ids_resolve_by_rule_and_an_unknown_one_has_no_price", "calls/test_quote: what_has_no_price_is_refused"],
}

ALLOWLIST = {
    "the query's model beats the body's": [BYPASS, SOCKET, "trick: model in the query"],
    "a passing-through path skips the allowlist and the budget": [BYPASS, SOCKET, "trick: other spending endpoints", "trick: doubled slash", "trick: trailing slash", "trick: percent encoding", "trick: upper case", "trick: other people's data"],
    "a pattern that is not anchored admits a longer name": ["policy/test_policy: models_are_judged_by_what_they_are_and_deny_wins", "trick: longer than the pattern"],
    "an alias or a prefixed name passes a denial": ["policy/test_policy: an_alias_is_rewritten_to_its_model_and_judged_as_that", "trick: denied model", "trick: provider prefix"],
    "models reached from within a request are not judged": ["policy/test_policy: unnamed_features_are_refused_and_named_ones_keep_limits", "trick: fallback model", "trick: advisor model", "trick: tool inside a message"],
    "a model that is absent, empty, no string or given twice reaches the provider": ["messages/test_two_readings: nothing_is_admitted_that_two_parsers_read_differently", "trick: model is absent", "trick: model is empty", "trick: model is no string", "trick: duplicate model"],
    "a body that is encoded, marked or broken is judged as something else": [
        "messages/test_two_readings: the_api_gets_through_a_socket_what_the_ledger_has",
        "proxy/test_wire: request_that_two_parsers_frame_differently_is_refused",
        "trick: content-encoding", "trick: byte order mark or another UTF", "trick: invalid UTF-8", "trick: too large",
    ],
    "an app sees models that it may not use": ["proxy/test_hooks: an_app_sees_only_the_models_it_may_use"],
}  # fmt: skip

RUNNING = {
    "a month that never resets, or at the hour of its first use, or after thirty days": ["test_windows: a_window_is_the_calendar_of_its_zone", "test_windows: windows_follow_each_other_without_gap_or_overlap"],
    "a call over midnight in two days or in none, and a clock that is set back": ["ledger/test_reservations: a_call_belongs_to_the_window_of_its_admission", "ledger/test_reservations: a_clock_set_back_finds_the_money_of_its_own_day"],
    "a revoked token that lives on in a cache": ["cli/test_token: leaked_token_is_revoked_and_other_apps_never_notice", "ledger/test_reservations: the_token_is_judged_again_with_the_money"],
    "a revocation that keeps a running call from being settled": ["ledger/test_reservations: a_running_call_settles_after_its_token_is_revoked"],
    "keys in audits, access logs, errors, tracebacks and debug output": [
        "test_secrets: neither_key_nor_token_is_in_any_flow_log_or_file",
        "test_secrets: no_secret_is_in_the_process_table_or_in_serves_output",
        "proxy/web/test_process: flow_file_and_har_hold_no_secret_if_stopped_mid_flight",
        "operations/test_logs: a_traceback_is_masked_like_its_message",
        "identity/test_tokens: a_refusal_never_repeats_the_credential",
    ],
    "prices that are reloaded under a running call": ["operations/test_reload: a_call_in_flight_is_priced_as_it_was_admitted"],
    "a reload that overwrites the operator's prices, or nobody knows whether it holds": ["pricing/test_prices_data: an_override_replaces_only_the_keys_that_it_names", "operations/test_reload: what_cannot_come_into_force_is_told_and_the_old_stays"],
    "memory that grows with the calls": ["proxy/test_scale: memory_is_flat_over_many_streamed_calls", "messages/test_meter: three_hundred_megabytes_in_constant_memory"],
    "a client that stops reading, and memory that grows with its stream": ["proxy/test_backpressure: clients_that_stop_reading_make_nothing_grow"],
    "a long silence with pings that something cuts": ["proxy/test_timeouts: a_stream_that_is_slow_but_not_silent_is_left_alone"],
    "a stream that is held back until it is whole": ["proxy/test_hooks: first_event_arrives_while_the_upstream_still_sends"],
    "a stream's tap that fails and drops bytes": ["proxy/test_hooks_failing: a_failing_tap_drops_no_byte_and_forgets_no_bill"],
    "a budget that is silently not saved": ["policy/test_policy: a_wrong_app_file_is_refused_with_place_and_reason", "policy/test_policy: every_key_of_the_design_is_read"],
    "a refusal for a budget that nobody has set, or without its amounts": ["calls/test_refusals_by_sdk: refusal_raises_the_sdk_class_with_a_helpful_sentence"],
}  # fmt: skip

HOSTILE_TOKEN = "identity/test_workloads: a_hostile_token_is_invalid"
IDENTITY = {
    "the algorithm, or the key, is taken from the token": [HOSTILE_TOKEN, "identity/test_workloads: each_algorithm_is_checked_by_a_key_of_its_own_type"],
    "a rotated key is refused until a restart, or a removed one lives on": ["identity/test_key_cache: a_rotated_key_passes_within_one_fetch"],
    "random kids flood the issuer, and good users are refused meanwhile": ["identity/test_key_cache: a_thousand_unknown_kids_ask_once_in_a_cooldown"],
    "a failed refresh wipes the keys, or stale ones are trusted for ever": ["identity/test_key_cache: an_outage_takes_no_key_away_for_a_day", "operations/test_issuer_keys: an_issuer_that_fails_is_told_once_until_it_is_back"],
    "an issuer that was down at the start never recovers": ["identity/test_key_cache: an_issuer_that_was_down_at_the_start_is_asked_again", "calls/test_identities: an_issuer_without_keys_is_503_and_never_open"],
    "a token for somebody else is taken, or one without an end": [HOSTILE_TOKEN],
    "a clock a second off refuses everybody without a clue": ["identity/test_workloads: a_clock_that_is_wrong_is_said_with_the_difference", "identity/test_workloads: a_good_token_is_its_apps_workload"],
    "a claim that the issuer left out falls to everybody's rule": ["identity/test_workloads: a_rule_matches_to_the_letter_or_says_why_not"],
    "one workload with two budgets, or one that a header chooses": ["identity/test_workloads: a_workload_of_two_apps_is_neithers", "calls/test_identities: a_refused_workload_gets_one_answer_in_both_ways"],
    "a rule so wide that strangers match it": ["policy/test_trusting: a_rule_that_lets_strangers_in_is_refused", "policy/test_trusting: a_repository_that_is_named_without_its_id_is_doubtful"],
    "a cached decision outlives a revocation, an end, or a rule": ["calls/test_identities: a_change_holds_at_the_next_call_in_every_process"],
    "identity tokens and sessions in flows, logs and ledgers": ["test_secrets: neither_key_nor_token_is_in_any_flow_log_or_file"],
    "a 403 for an expired token, which nobody renews": ["identity/test_workloads: an_expired_token_is_told_apart_so_that_clients_renew", "calls/test_identities: by_the_environment_alone_the_sdk_gets_in"],
    "a stream that ends with its session": ["calls/test_identities: a_stream_outlives_its_session"],
    "a session that is minted though nobody can write it down": ["calls/test_identities: without_a_ledger_nothing_is_minted"],
    "an address in a document that leads to a metadata service": ["test_http_client: a_guarded_question_is_never_a_metadata_services", "operations/test_issuer_keys: a_server_that_does_not_answer_as_it_should_is_named"],
}  # fmt: skip

TRICKS = {row.trick for row in HOSTILE}


def named(test: str) -> bool:
    """Whether a test of that name is there."""
    file, _, name = test.partition(": ")
    if file == "trick":
        return name in TRICKS
    tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
    return f"test_{name}" in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_each_known_mistake_is_forbidden_by_a_test_that_is_there():
    missing = {mistake: [test for test in tests if not named(test)] for mistake, tests in (SPENDING | ALLOWLIST | RUNNING | IDENTITY).items()}
    assert {mistake: tests for mistake, tests in missing.items() if tests} == {}
