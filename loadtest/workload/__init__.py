"""Which requests are sent, and when each is due."""
