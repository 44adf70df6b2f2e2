"""All that knows mitmproxy: a flow's hooks, the credential on the wire copy, the servers and the supervisor."""
