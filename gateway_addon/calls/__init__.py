"""One call's life, without mitmproxy, SQL or YAML: admit, quote, reserve, top up, settle, record."""
