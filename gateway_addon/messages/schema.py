"""Every field, tool, block and source that a Messages request may carry, with what it can do to the bill.

The table is data: what the `anthropic` SDK 2.14 sends (a test compares it with the SDK's types, so an update that adds a
field turns red with its name), what Claude Code 2.1.330 sends, and the few fields that only older clients still send.
New fields have been new ways to spend, so what is not here is refused by name unless a policy passes unknown fields.

Types are looked up wherever they occur, not only where they belong: a tool defined inline inside a message
(`tool_addition`, beta inline-tools-2026-09-15) is the same tool as one in `tools`.
"""

from dataclasses import dataclass
from enum import Enum


class Effect(Enum):
    """The effect of an object on the prompt that the model reads, beyond its own bytes."""

    NONE = "the bytes bound it"
    TYPED_TOOL = "adds a hidden description to the prompt"
    SERVER_TOOL = "runs at the provider: the prompt is read again, with results, after each use"
    OUTSIDE = "brings text that is not in the body, up to the context window"


@dataclass(frozen=True, slots=True)
class ObjectSchema:
    """A row: the fields an object may have, the feature that a policy must name for it, its effect on the prompt."""

    fields: frozenset[str]
    feature: str | None = None
    effect: Effect = Effect.NONE
    free: frozenset[str] = frozenset()
    """The fields that are free zones."""


def _rows(effect: Effect, feature: str | None, rows: dict[str, str]) -> dict[str, ObjectSchema]:
    """Return the rows written as {"type or types": "field names"}."""
    return {name: ObjectSchema(frozenset(fields.split()), feature, effect) for names, fields in rows.items() for name in names.split()}


_TOOL = "name allowed_callers cache_control defer_loading strict "
_CLIENT_TOOL = _TOOL + "input_examples "
_COMPUTER = _CLIENT_TOOL + "display_height_px display_width_px display_number "
_SEARCH = _TOOL + "allowed_domains blocked_domains max_uses user_location "
_FETCH = _TOOL + "allowed_domains blocked_domains max_uses citations max_content_tokens url_sources "
_CUSTOM_TOOL = _CLIENT_TOOL + "description eager_input_streaming input_schema "
_RESULT = "content tool_use_id cache_control "

TYPES: dict[str, ObjectSchema] = {
    # tools that the app runs itself
    **_rows(Effect.NONE, None, {"custom": _CUSTOM_TOOL}),
    **_rows(
        Effect.TYPED_TOOL,
        None,
        {
            "bash_20241022 bash_20250124 memory_20250818": _CLIENT_TOOL,
            "text_editor_20241022 text_editor_20250124 text_editor_20250429": _CLIENT_TOOL,
            "text_editor_20250728": _CLIENT_TOOL + "max_characters",
            "computer_20241022 computer_20250124": _COMPUTER,
            "computer_20251124": _COMPUTER + "enable_zoom",
            "browser_toolset_20260801 computer_toolset_20260801": "cache_control configs",
        },
    ),
    # tools that run at the provider, and the answers of theirs that are larger than they look
    **_rows(
        Effect.SERVER_TOOL,
        "web_search",
        {"web_search_20250305 web_search_20260209": _SEARCH, "web_search_20260318": _SEARCH + "response_inclusion"},
    ),
    **_rows(
        Effect.SERVER_TOOL,
        "web_fetch",
        {
            "web_fetch_20250910 web_fetch_20260209": _FETCH,
            "web_fetch_20260309": _FETCH + "use_cache",
            "web_fetch_20260318": _FETCH + "use_cache response_inclusion",
        },
    ),
    **_rows(
        Effect.SERVER_TOOL,
        "code_execution",
        {
            # the middle two are also the `caller` of a tool_use block (there with `tool_id`)
            "code_execution_20250522 code_execution_20260521": _TOOL,
            "code_execution_20250825 code_execution_20260120": _TOOL + "tool_id",
        },
    ),
    **_rows(
        Effect.SERVER_TOOL,
        "tool_search",
        {"tool_search_tool_bm25 tool_search_tool_bm25_20251119 tool_search_tool_regex tool_search_tool_regex_20251119": _TOOL},
    ),
    **_rows(Effect.SERVER_TOOL, "mcp", {"mcp_toolset": "cache_control configs default_config mcp_server_name tools"}),
    **_rows(Effect.TYPED_TOOL, "advisor", {"advisor_20260301": _TOOL + "caching max_tokens max_uses model"}),
    **_rows(Effect.OUTSIDE, "web_search", {"web_search_tool_result": _RESULT + "caller"}),
    **_rows(Effect.OUTSIDE, "code_execution", {"encrypted_code_execution_result": "content encrypted_stdout return_code stderr"}),
    **_rows(Effect.OUTSIDE, "advisor", {"advisor_redacted_result": "encrypted_content stop_reason"}),
    **_rows(Effect.OUTSIDE, "container", {"container_upload": "cache_control file_id"}),
    # where images and documents come from
    **_rows(Effect.OUTSIDE, "files", {"url": "url", "file": "file_id"}),
    **_rows(
        Effect.NONE,
        None,
        {
            "base64": "data media_type",
            "content": "content",
            "text": "text cache_control citations data media_type",  # a block, or a document's plain source
            # blocks
            "image": "cache_control source transformations",
            "document": "cache_control citations context source title",
            "search_result": "cache_control citations content source title",
            "thinking": "signature thinking",
            "redacted_thinking": "data",
            "tool_use": "cache_control caller id input name toolset_name",
            "tool_result": _RESULT + "is_error toolset_name",
            "tool_reference": "cache_control name tool_name",
            "server_tool_use": "cache_control caller id input name",
            "mcp_tool_use": "cache_control id input name server_name",
            "mcp_tool_result": _RESULT + "is_error",
            "mcp_tool_listing": "mcp_server_name tools",
            "compaction": "cache_control content encrypted_content signature tool_changes",
            "fallback": "from to trigger",
            "browser_state": "cache_control state_changes tabs",
            "tool_addition tool_removal": "cache_control tool",
            "tool_definition": "definition",
            "mcp_tool_reference": "name server_name",
            "mcp_toolset_reference": "server_name",
            # what tools of the provider answered, echoed by the app
            "web_search_result": "encrypted_content page_age title url",
            "web_fetch_tool_result": _RESULT + "caller",
            "web_fetch_result": "content retrieved_at url",
            "advisor_tool_result tool_search_tool_result code_execution_tool_result": _RESULT,
            "bash_code_execution_tool_result text_editor_code_execution_tool_result": _RESULT,
            "advisor_result": "stop_reason text",
            "code_execution_result bash_code_execution_result": "content return_code stderr stdout",
            "code_execution_output bash_code_execution_output": "file_id",
            "text_editor_code_execution_create_result": "is_file_update",
            "text_editor_code_execution_str_replace_result": "lines new_lines new_start old_lines old_start",
            "text_editor_code_execution_view_result": "content file_type num_lines start_line total_lines",
            "tool_search_tool_search_result": "tool_references",
            "web_search_tool_result_error web_fetch_tool_result_error advisor_tool_result_error": "error_code",
            "code_execution_tool_result_error bash_code_execution_tool_result_error": "error_code",
            "text_editor_code_execution_tool_result_error tool_search_tool_result_error": "error_code error_message",
            "tab_opened": "tab_id",
            "download_started": "download_id url",
            "download_completed": "download_id path size_bytes url",
            "download_failed": "download_id error url",
            # citations
            "char_location": "cited_text document_index document_title end_char_index start_char_index",
            "page_location": "cited_text document_index document_title end_page_number start_page_number",
            "content_block_location": "cited_text document_index document_title end_block_index start_block_index",
            "search_result_location": "cited_text end_block_index search_result_index source start_block_index title",
            "web_search_result_location": "cited_text encrypted_index title url",
            # settings
            "ephemeral": "ttl",
            "adaptive": "block_binding display",
            "enabled": "block_binding budget_tokens display",
            "disabled between_tools none all direct create": "",
            "auto any": "disable_parallel_tool_use",
            "tool": "disable_parallel_tool_use name",
            "only except": "tools",
            "json_schema": "schema",
            "tokens": "remaining total",
            "approximate": "city country region timezone",
            "clear_thinking_20251015": "keep",
            "clear_tool_uses_20250919": "clear_at_least clear_tool_inputs exclude_tools keep trigger",
            "input_tokens tool_uses thinking_turns": "value",
            "continue": "previous_message_id",
            "summarize": "instructions",
            "billing_policy": "bill_to",
        },
    ),
    **_rows(Effect.NONE, "compaction", {"compact_20260112": "instructions pause_after_compaction trigger"}),
}

BODY = "cache_control diagnostics fallback_credit_token max_tokens messages metadata model output_config stop_sequences stream system "
BODY += "thinking tool_choice tools service_tier inference_geo speed context_management "
BODY += "temperature top_p top_k output_format"  # only clients of anthropic-version 2023-06-01 send this line

BODY_FEATURES: dict[str, str] = {
    "billing_policy": "user_profile",
    "compaction": "compaction",
    "container": "container",
    "fallbacks": "fallbacks",
    "mcp_servers": "mcp",
    "thread": "thread",
}
"""Top-level fields that spend in ways which the body does not bound: a policy must name the feature."""

UNTYPED: dict[str, frozenset[str]] = {
    # objects without a `type`, by the field that holds them; "" is the body itself
    name: frozenset(fields.split())
    for name, fields in {
        "": BODY + " " + " ".join(BODY_FEATURES),
        "block_binding": "prefix_mismatch_behavior",
        "citations": "enabled",
        "configs": "defer_loading enabled",
        "container": "id skills",
        "context_management": "edits",
        "default_config": "defer_loading enabled",
        "definition": _CUSTOM_TOOL,
        "diagnostics": "previous_message_id",
        "fallback_credit_token": "mode token",
        "fallbacks": "max_tokens model output_config speed thinking",
        "from": "model",
        "mcp_servers": "authorization_token name tool_configuration type url",
        "messages": "clear_at content output_config role",
        "metadata": "user_id",
        "output_config": "effort format task_budget",
        "skills": "skill_id type version",
        "tabs": "active tab_id title url",
        "to": "model",
        "tool_configuration": "allowed_tools enabled",
        "tools": _CUSTOM_TOOL,
        "transformations": "oversized_image",
        "url_sources": "client_tool_results server_tool_results user_input",
    }.items()
}

BY_FIELD = frozenset({"mcp_servers", "skills"})
"""Fields whose objects are read by the field alone: their `type` says something else there (`url`, `custom`)."""

MAPS = frozenset({"configs"})
"""Fields that hold an object keyed by names of the app's own choosing."""

FREE = frozenset({"input", "input_examples", "input_schema", "schema"})
"""Fields that hold any JSON at all (schemas, a tool's arguments): text to the model, whatever its keys are called."""

FREE_IN = {"fallback": "trigger"}
"""The free field of one type only."""

ENCODED_PARENTS = {"image", "document"}
"""Blocks whose base64 source is an image or a PDF: its bytes are not text."""

HEADER_FEATURES: dict[str, str] = {"anthropic-user-profile-id": "user_profile", "anthropic-workspace-id": "workspace"}
"""Headers that choose who is billed, and where."""
