"""What Claude Code loses by its start, from values: the settings of a machine, and the lines that a person reads."""

import pytest

from gateway_addon.onboarding.claude_code import LOST, NOT_IN_GATEWAY_MODE, diagnose, settings, start_of, status_line

HERE = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8080", "ANTHROPIC_AUTH_TOKEN": "gwt_abc"}
MODE = HERE | {"CLAUDE_CODE_USE_GATEWAY": "1"}


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        ({}, "past"),
        ({"ANTHROPIC_BASE_URL": "https://api.anthropic.com"}, "past"),
        ({"HTTPS_PROXY": "http://app:gwt_x@127.0.0.1:8082"}, "proxy"),
        (HERE, "base_url"),
        (HERE | {"CLAUDE_CODE_USE_GATEWAY": "0"}, "base_url"),
        (MODE, "gateway_mode"),
    ],
)
def test_the_variables_decide_how_it_starts(environment, start):
    assert start_of(settings(environment, [])) == start


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, "none is capped or recorded"),
        (HERE | {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8080/v1"}, "make it http://127.0.0.1:8080"),
        ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:8080"}, "no token is set"),
        (HERE | {"ANTHROPIC_API_KEY": "sk-ant-api03-real"}, "ANTHROPIC_API_KEY (the environment) holds no gateway token"),
        (MODE, "name one that the app may use in ANTHROPIC_MODEL"),
        (HERE | {"CLAUDE_CODE_USE_BEDROCK": "1"}, "it calls a cloud, past the gateway"),
    ],
)
def test_what_leads_calls_astray_is_a_finding(environment, named):
    found = diagnose(settings(environment, []), has_key_helper=False, has_model=False)
    assert [finding for finding in found.findings if named in finding], found.findings


@pytest.mark.parametrize(
    "environment",
    [
        HERE,
        MODE | {"ANTHROPIC_MODEL": "claude-sonnet-5"},
        {"HTTPS_PROXY": "http://x:1"},
        HERE | {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8080/l/client=acme"},
    ],
)
def test_a_start_that_is_right_has_no_finding(environment):
    assert diagnose(settings(environment, []), has_key_helper=False, has_model=False).findings == []


def test_a_key_helper_and_a_model_in_the_settings_count():
    without = {name: value for name, value in MODE.items() if name != "ANTHROPIC_AUTH_TOKEN"}
    assert diagnose(settings(without, []), has_key_helper=True, has_model=True).findings == []


def test_a_settings_file_goes_before_the_environment():
    files = [
        ("local", {"env": {"ANTHROPIC_BASE_URL": "http://one"}}),
        ("user", {"env": {"ANTHROPIC_BASE_URL": "http://two"}}),
        ("odd", {"env": 3}),
    ]
    found = settings(HERE, files)
    assert found["ANTHROPIC_BASE_URL"] == ("http://one", "local")
    assert found["ANTHROPIC_AUTH_TOKEN"] == ("gwt_abc", "the environment")


def test_no_secret_is_shown():
    secret = {"ANTHROPIC_API_KEY": "sk-ant-secret", "HTTPS_PROXY": "http://user:secret@proxy:1"}
    found = diagnose(settings(HERE | secret, []), has_key_helper=False, has_model=False)
    assert "secret" not in f"{found}"
    assert "gwt_abc" not in f"{found}"


def test_each_feature_that_is_lost_is_named():
    seen = diagnose(settings(MODE, []), has_key_helper=False, has_model=True).seen
    assert all(feature in " ".join(seen) for feature in NOT_IN_GATEWAY_MODE.values())
    assert LOST["base_url"].items() <= LOST["gateway_mode"].items()


def window(name, spent, cap):
    return {"window": name, "spent_nano": spent, "cap_nano": cap}


@pytest.mark.parametrize(
    ("windows", "line"),
    [
        ([window("day", 1_250_000_000, 5 * 10**9), window("month", 10**9, 60 * 10**9)], "coder: $1.25 of $5.00 today (25 %), $3.75 left"),
        ([window("day", 0, None), window("ever", 6 * 10**9, 5 * 10**9)], "coder: $6.00 of $5.00 (120 %), $0.00 left"),
        ([window("day", 0, None)], "coder: no cap"),
    ],
)
def test_the_status_line_names_the_fullest_cap(windows, line):
    assert status_line({"app": "coder", "windows": windows}) == line
