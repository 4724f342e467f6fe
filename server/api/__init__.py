"""The calls of the server: messages to queries, what was found to replies. One file for each public surface."""
