"""mitmproxy's own layers, faster. Imports nothing of the gateway; each part can be switched off alone."""
