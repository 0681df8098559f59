"""Votes and what becomes of them."""
