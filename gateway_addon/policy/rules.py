"""Judge a request by its app's policy: the rules, in the order in which they are applied.

Promises one list of rules for the gateway's judgement and for what `explain` prints. Deny by default: a feature is used only
where the app's policy names it. Knows nothing of money: an allowed request is then quoted (calls/quote.py) and capped (the ledger).
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from gateway_addon.messages.request import MESSAGES, ParsedRequest
from gateway_addon.messages.scan import FeatureUse
from gateway_addon.policy import labels
from gateway_addon.policy.model import AppPolicy, caps_by_model
from gateway_addon.pricing import Prices
from gateway_addon.refusals import Refusal, stated


class RuleVerdict(NamedTuple):
    """One rule's answer to one request: a sentence, and the code of the refusal where it refuses. Rules are named as their keys are."""

    rule: str
    sentence: str
    code: str | None = None


PROMPTS = (*MESSAGES, "count_tokens")
THINKING_TOKENS_MIN = 1_024
"""The API's least budget of thinking, which has to be below `max_tokens`."""
CLAMPED = ("max_tokens", "thinking", "fallbacks")
"""The fields that a clamp rewrites."""
_ALWAYS = ("hello", "healthz", "me", "usage")


def judge(app: AppPolicy, parsed: ParsedRequest, prices: Prices) -> Refusal | None:
    """Return the refusal of the first rule that refuses, or None. Observed rules refuse nothing."""
    for verdict in trail(app, parsed, prices):
        if verdict.code is not None and not app.observes(verdict.rule):
            return stated(verdict.code, verdict.sentence)
    return None


def observed(app: AppPolicy, parsed: ParsedRequest, prices: Prices) -> tuple[str, ...]:
    """Return the refusal codes that the observed rules would have given, once each."""
    if app.mode == "enforce" and not app.observe:
        return ()
    verdicts = trail(app, parsed, prices)
    return tuple(dict.fromkeys(verdict.code for verdict in verdicts if verdict.code is not None and app.observes(verdict.rule)))


def trail(app: AppPolicy, parsed: ParsedRequest, prices: Prices) -> Iterator[RuleVerdict]:
    """Yield every rule's verdict, in order. Rules after a refusal are judged too: `explain` shows them all."""
    yield _endpoint(app, parsed)
    if parsed.endpoint in (*PROMPTS, "model"):
        yield _model(app, parsed.model, "model", prices)
    yield from _labels(app, parsed)
    if parsed.endpoint not in PROMPTS:  # they bring features along in their headers
        yield from _features(app, parsed)
        yield from _betas(app, parsed)
        return
    for where, model in _reachable(app, parsed):
        yield _model(app, model, where, prices)
        yield from _counted_under_one(app, parsed, where, model, prices)
    yield from _unknown(app, parsed)
    yield from _features(app, parsed)
    yield from _betas(app, parsed)
    if parsed.endpoint in MESSAGES:
        yield from _max_tokens(app, parsed)
        yield from _too_little_thinking(app, parsed)
    yield from _thinking(app, parsed)
    yield from _requirements(app, parsed)


def edits(app: AppPolicy, parsed: ParsedRequest, prices: Prices) -> dict[str, Any]:
    """Return the top-level fields that the policy rewrites: opt-in, recorded.

    An alias or a moving name becomes its model; a clamped `max_tokens` takes a thinking budget down with it.
    """
    changes: dict[str, Any] = {}
    model = model_sent(app, parsed.model, prices)
    if model != parsed.model:
        changes["model"] = model
    ceiling = app.max_tokens
    if parsed.endpoint in MESSAGES and ceiling and ceiling.over == "clamp" and parsed.max_tokens > ceiling.limit:
        changes |= {"max_tokens": ceiling.limit, **_less_thinking(parsed, ceiling.limit)}
    return changes


def _less_thinking(parsed: ParsedRequest, limit: int) -> dict[str, Any]:
    """Return the fields whose thinking budget no longer fits below the clamped `max_tokens`, with a smaller budget.

    A budget that was above before (interleaved thinking) is left alone.
    """

    def lowered(holder: Any) -> Any:
        thinking = holder.get("thinking") if isinstance(holder, Mapping) else None
        budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
        if thinking is None or type(budget) is not int or not limit <= budget < parsed.max_tokens:
            return holder
        return {**holder, "thinking": {**thinking, "budget_tokens": limit - 1}}

    changes = {}
    if (body := lowered(parsed.body)) is not parsed.body:
        changes["thinking"] = body["thinking"]
    fallbacks = parsed.body.get("fallbacks")
    if isinstance(fallbacks, list):
        fitting = [entry if isinstance(entry, dict) and "max_tokens" in entry else lowered(entry) for entry in fallbacks]
        changes |= {"fallbacks": fitting} if fitting != fallbacks else {}
    return changes


def matching(pattern: str, prices: Prices) -> frozenset[str]:
    """Return the models that a policy's pattern matches: by canonical id, among those with a price."""
    exact = prices.canonical(pattern)
    return frozenset(model for model in prices.models() if model == exact or fnmatchcase(model, pattern))


def may_use(app: AppPolicy, model: str, prices: Prices) -> bool:
    """Return whether an app may use a model, under any of its names."""
    return _model(app, model_sent(app, model, prices), "model", prices).code is None


def model_sent(app: AppPolicy, model: str, prices: Prices) -> str:
    """Return the model that a request for `model` is sent with."""
    model = app.models.aliases.get(model, model)
    pinned = prices.snapshot(model) if app.models.moving == "pin" and prices.moves(model) else None
    return pinned or model


def _endpoint(app: AppPolicy, parsed: ParsedRequest) -> RuleVerdict:
    name = {"model": "models", "batch_request": "batches"}.get(parsed.endpoint, parsed.endpoint.partition(".")[0])
    if name in app.endpoints or name in _ALWAYS:
        return RuleVerdict("endpoints", f"{name} is open to {app}")
    return RuleVerdict(
        "endpoints", f"{app} may not call {name}; allowed: {_listed(app.endpoints)} ({app.file} endpoints)", "endpoint"
    )


def _labels(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    if parsed.labels or parsed.fixed_labels or app.labels:
        for sentence, refused in labels.verdicts(app, parsed):
            yield RuleVerdict("labels", sentence, "label" if refused else None)


def _model(app: AppPolicy, asked: str, where: str, prices: Prices) -> RuleVerdict:
    """Judge a model by its canonical id: no spelling makes it another model, and a denied name is denied in each."""
    shown = asked if where == "model" else f"{asked} ({where})"
    canonical = prices.canonical(asked)
    if canonical is None:
        return RuleVerdict("models", f"{app} asks for {asked[:100]!r} ({where}), which is no known model; {_models_of(app)}", "model")
    for pattern in app.models.deny:
        if fnmatchcase(asked, pattern) or fnmatchcase(canonical, pattern) or canonical == prices.canonical(pattern):
            denied = f"{app} may not use {shown}, denied by {pattern} ({app.file} models.deny)"
            return RuleVerdict("models", f"{denied}; {_models_of(app)}", "model")
    if not any(fnmatchcase(canonical, pattern) or canonical == prices.canonical(pattern) for pattern in app.models.allow):
        return RuleVerdict("models", f"{app} may not use {shown}; {_models_of(app)}", "model")
    if app.models.moving != "pass" and prices.moves(asked):
        known = prices.snapshot(asked)
        instead = f"ask for {known}" if known else "ask for a dated id"
        sentence = f"{app} may not use {shown}, a name that the provider may move to another model; {instead}"
        return RuleVerdict("models", f"{sentence} ({app.file} models.moving)", "model")
    return RuleVerdict("models", f"{app} may use {canonical}{'' if shown == canonical else f', which {shown} is'}")


def _models_of(app: AppPolicy) -> str:
    return f"allowed: {_listed(app.models.allow)} ({app.file} models.allow)"


def _reachable(app: AppPolicy, parsed: ParsedRequest) -> Iterator[tuple[str, str]]:
    """Yield the other models that a request can reach. The policy says which ones `fallbacks: "default"` reaches."""
    yield from parsed.found.models
    fallbacks = app.features.get("fallbacks")
    if fallbacks and parsed.body.get("fallbacks") == "default":
        yield from (("fallbacks default", model) for model in fallbacks.default)


def _counted_under_one(app: AppPolicy, parsed: ParsedRequest, where: str, model: str, prices: Prices) -> Iterator[RuleVerdict]:
    """Refuse another model beside the one asked for where models have caps: what it spends would count under the wrong one."""
    asked = model_sent(app, parsed.model, prices)
    if caps_by_model(app) and prices.canonical(model) != prices.canonical(asked):
        sentence = f"app {app.name} has caps on each model, and a call counts under one: {where} asks for {model} beside {asked}"
        yield RuleVerdict("models", f"{sentence}; leave it out ({app.file} each.model, models.caps)", "model")


def _unknown(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    unknown = parsed.found.unknown
    if not unknown:
        yield RuleVerdict("unknown_fields", "every field and type is known")
    elif app.unknown_fields == "pass":
        yield RuleVerdict("unknown_fields", f"unknown, passed by unknown_fields: pass: {_listed(unknown[:5])}")
    else:
        sentence = f"{app} sends {unknown[0]}, which this gateway does not know and cannot bound; leave it out, or allow it with"
        yield RuleVerdict("unknown_fields", f"{sentence} unknown_fields: pass in {app.file}", "unknown_field")


def _features(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    uses: dict[str, int] = {}
    for use in parsed.found.uses:
        refused = _feature_refused(app, use)
        if refused is None and use.is_tool and app.features[use.feature].max_uses is not None:
            refused = _too_many(app, use, uses)
        code = "thread" if use.feature == "thread" else "feature"
        yield RuleVerdict("features", refused or f"{use.feature} ({use.where}) is named by the policy", code if refused else None)
    if parsed.hour_ttl and "hour_ttl" not in app.features:
        sentence = f"{app} may not write caches of an hour; leave out ttl, or set hour_ttl: true ({app.file} features)"
        yield RuleVerdict("features", sentence, "feature")


def _feature_refused(app: AppPolicy, use: FeatureUse) -> str | None:
    feature = app.features.get(use.feature)
    if feature is None:
        named = [name for name in app.features if name != "hour_ttl"]
        return f"{app} may not use {use.feature} ({use.where}); allowed features: {_listed(named)} ({app.file} features)"
    if use.feature == "fallbacks" and not isinstance(use.value, list):
        if use.value != "default":
            return f'fallbacks must be a list of models or "default", not {use.value!r:.80}'
        if not feature.default:
            return f"""{app} may not use fallbacks: "default", whose models are the provider's choice; list the models, or name \
the ones it may reach as default: [...] ({app.file} features.fallbacks)"""
    if use.feature == "mcp" and use.where == "mcp_servers" and feature.servers:
        for server in use.value if isinstance(use.value, list) else [use.value]:
            url = server.get("url") if isinstance(server, dict) else None
            if not isinstance(url, str) or not any(fnmatchcase(url, pattern) for pattern in feature.servers):
                allowed = f"allowed: {_listed(feature.servers)} ({app.file} features.mcp)"
                return f"{app} may not use the MCP server {str(url)[:200]!r}; {allowed}"
    return None


def _too_many(app: AppPolicy, use: FeatureUse, uses: dict[str, int]) -> str | None:
    """Count the uses of one feature over the whole request: two search tools do not make two budgets."""
    limit, stated = app.features[use.feature].max_uses, use.value.get("max_uses")
    if type(stated) is not int or stated < 0:
        return f"{app} must give {use.where} a max_uses of its own, at most {limit} in a request ({app.file} features)"
    total = uses[use.feature] = uses.get(use.feature, 0) + stated
    if limit is not None and total > limit:
        return f"{app} may use {use.feature} {limit} times in a request, not {total} ({use.where}.max_uses; {app.file} features)"
    return None


def _betas(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    for beta in parsed.betas:
        denied = any(fnmatchcase(beta, pattern) for pattern in app.betas.deny)
        if denied or not any(fnmatchcase(beta, pattern) for pattern in app.betas.allow):
            allowed = f"allowed: {_listed(app.betas.allow)}" + (f" without {_listed(app.betas.deny)}" if app.betas.deny else "")
            yield RuleVerdict("betas", f"{app} may not send anthropic-beta {beta[:100]}; {allowed} ({app.file} betas)", "feature")


def _max_tokens(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    if app.max_tokens is None:
        yield RuleVerdict("max_tokens", f"{parsed.max_tokens:,}; {app} has no ceiling")
        return
    limit = app.max_tokens.limit
    for where, asked in (("max_tokens", parsed.max_tokens), *_fallback_values(parsed, "max_tokens")):
        if where == "max_tokens" and app.max_tokens.over == "clamp" and parsed.max_tokens > limit:
            yield RuleVerdict("max_tokens", f"{asked:,} is above {limit:,}, and passes: a stream that is held in steps is not clamped")
        elif asked is not None and (type(asked) is not int or asked > limit):
            sentence = f"{app} may ask for at most {limit:,} tokens of output, not {asked!r:.40} ({where}); lower it"
            if where == "max_tokens":
                sentence += f", or have the gateway lower it by max_tokens: {{limit: {limit}, over: clamp}}"
            yield RuleVerdict("max_tokens", f"{sentence} ({app.file} max_tokens)", "max_tokens")
        else:
            yield RuleVerdict("max_tokens", f"{where} is within {limit:,}")


def _too_little_thinking(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    """Refuse a clamp that leaves less thinking than the API takes: a sentence is better than the API's 400."""
    ceiling = app.max_tokens
    if ceiling is None or ceiling.over != "clamp" or ceiling.limit > THINKING_TOKENS_MIN:
        return
    for where, thinking in (("thinking", parsed.body.get("thinking")), *_fallback_values(parsed, "thinking")):
        budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
        if type(budget) is int and budget < THINKING_TOKENS_MIN:
            sentence = f"{app} is held to {ceiling.limit:,} tokens of output, which leaves {where}.budget_tokens less than"
            sentence += f" the API's least, {THINKING_TOKENS_MIN:,}; ask without thinking, or raise the limit ({app.file} max_tokens)"
            yield RuleVerdict("max_tokens", sentence, "max_tokens")


def _thinking(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    limit, levels = app.thinking.budget_tokens, app.thinking.effort
    for where, thinking in (("thinking", parsed.body.get("thinking")), *_fallback_values(parsed, "thinking")):
        budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
        if limit is not None and budget is not None and (type(budget) is not int or budget > limit):
            sentence = f"{app} may think with at most {limit:,} tokens, not {budget!r:.40} ({where}.budget_tokens); lower it"
            yield RuleVerdict("thinking", f"{sentence} ({app.file} thinking)", "feature")
    for where, config in _output_configs(parsed) if levels else ():
        effort = config.get("effort")
        if effort is not None and effort not in levels:
            sentence = f"{app} may not ask for effort {effort!r:.40} ({where}); allowed: {_listed(levels)}"
            yield RuleVerdict("thinking", f"{sentence} ({app.file} thinking.effort)", "feature")


def _output_configs(parsed: ParsedRequest) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every place where a request can set its effort: at the top, in a system message, for a fallback."""
    places = [("output_config", parsed.body.get("output_config")), *_fallback_values(parsed, "output_config")]
    for i, message in enumerate(parsed.body["messages"]):
        if isinstance(message, dict) and "output_config" in message:
            places.append((f"messages[{i}].output_config", message["output_config"]))
    return ((where, config) for where, config in places if isinstance(config, dict))


def _fallback_values(parsed: ParsedRequest, name: str) -> list[tuple[str, Any]]:
    fallbacks = parsed.body.get("fallbacks")
    entries = fallbacks if isinstance(fallbacks, list) else []
    return [(f"fallbacks[{i}].{name}", entry[name]) for i, entry in enumerate(entries) if isinstance(entry, dict) and name in entry]


def _requirements(app: AppPolicy, parsed: ParsedRequest) -> Iterator[RuleVerdict]:
    metadata = parsed.body.get("metadata")
    carried = {
        "metadata.user_id": metadata.get("user_id") if isinstance(metadata, dict) else None,
        "system": parsed.body.get("system"),
    }
    for name in app.require:
        value = carried[name]
        if not value or (name == "metadata.user_id" and not isinstance(value, str)):
            yield RuleVerdict("require", f"{app} must send {name} with each request ({app.file} require)", "requirement")
        else:
            yield RuleVerdict("require", f"{name} is given")


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
