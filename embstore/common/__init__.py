"""What the library, the server and the load test share. Needs no torch."""
