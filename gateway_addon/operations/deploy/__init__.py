"""Texts that run the gateway as a service."""
