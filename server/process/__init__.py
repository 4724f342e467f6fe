"""The process: start, listen, supervise workers, drain, stop."""
