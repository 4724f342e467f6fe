"""How a lookup is written: one file for each protocol, all of them decode to the same queries."""
