"""Rows from memory or Redis where that is faster than computing them."""
