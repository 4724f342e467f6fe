"""What both clients do, without IO: requests, answers, plans, attempts, addresses."""
