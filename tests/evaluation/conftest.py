"""The loopback chat endpoint as a fixture."""

from chat_server import server

__all__ = ["server"]
