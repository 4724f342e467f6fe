"""Compressing a table that exists: vectors in, the scheme's best fit to them out, with a report of what it costs.

    vectors, counts -> fit within the bytes -> measure what would be served -> store.publish -> report

`run.compress` tells that story from top to bottom, `command` writes the page afterwards; every other file is a step.
"""
