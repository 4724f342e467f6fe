"""HTTP: bytes to messages and back. Knows no table; the handlers of `server.api` are handed in."""
