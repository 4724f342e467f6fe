"""Load for a server, and what it does to it."""
