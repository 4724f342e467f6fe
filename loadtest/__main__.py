"""`python -m loadtest` is the load test's command line."""

from loadtest.command import main

main()
