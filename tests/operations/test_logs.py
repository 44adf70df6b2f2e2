"""The log hides secrets, whoever logs them."""

import io
import logging

import pytest

from gateway_addon.operations.logs import LOUD, MaskedFilter, say_plainly

KEY = "sk-ant-api03-the-real-one"
TOKEN = "gwt_7aB37aB37aB37aB37aB37aB37aB37aB37aB37aB37aB4A6hPU"


@pytest.fixture
def log():
    """A logger of its own and what it wrote."""
    written, logger = io.StringIO(), logging.Logger("test")
    handler = logging.StreamHandler(written)
    handler.addFilter(MaskedFilter(lambda: KEY))
    logger.addHandler(handler)
    return logger, written


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (f"refused {TOKEN}", ()),
        ("refused %s by %r", (TOKEN, KEY)),
        ("cut to %s", (TOKEN[:20],)),
        ("%s", ({"authorization": f"Bearer {TOKEN}", "x-api-key": KEY},)),
        ("bytes %r", (b"x-api-key: " + KEY.encode(),)),
    ],
)
def test_neither_token_nor_key_nor_a_piece_of_a_token_is_written(log, message, arguments):
    logger, written = log
    logger.warning(message, *arguments)
    assert "***" in written.getvalue()
    assert not [secret for secret in (TOKEN, TOKEN[4:20], KEY) if secret in written.getvalue()]


def test_a_traceback_is_masked_like_its_message(log):
    logger, written = log
    try:
        raise ValueError(f"bad header {TOKEN} {KEY}")
    except ValueError:
        logger.exception("failed")
    assert "ValueError: bad header gwt_*** ***" in written.getvalue()


def test_what_mitmproxy_prints_of_foreign_bytes_is_cut():
    record = logging.LogRecord("mitmproxy.proxy.server", logging.WARNING, "", 0, "Cannot parse ClientHello: %s", (TOKEN + "16" * 5_000,), None)
    assert MaskedFilter(lambda: KEY).filter(record)
    assert record.getMessage().startswith("Cannot parse ClientHello: gwt_***")
    assert len(record.getMessage()) < 400


def test_what_is_no_secret_passes_unchanged(log):
    logger, written = log
    logger.info("app %s spent $%.2f", "reports", 1.5)
    assert written.getvalue() == "app reports spent $1.50\n"


def test_unreadable_key_silences_nothing_and_tokens_stay_hidden():
    """A key that cannot be read silences nothing and tokens stay hidden."""
    def broken() -> str:
        raise OSError("the key file is gone")

    assert MaskedFilter(broken).mask(f"for {TOKEN}") == "for gwt_***"


def test_a_renewed_key_is_hidden_too():
    keys = iter(["sk-ant-first", "sk-ant-second"])
    masked = MaskedFilter(lambda: next(keys))
    assert masked.mask("sk-ant-first") == "***"
    assert masked.mask("sk-ant-second") == "***"


def test_gateway_logs_at_info_and_the_proxy_only_faults(monkeypatch):
    """The gateway logs at info, and the proxy only what is wrong."""
    root, loud = logging.Logger("root"), {name: logging.Logger(name) for name in LOUD}
    real = logging.getLogger
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root if name is None else loud.get(name) or real(name))
    say_plainly(lambda: KEY)
    assert [handler.filters != [] for handler in root.handlers] == [True]
    assert root.level == logging.INFO
    assert {each.level for each in loud.values()} == {logging.WARNING}
