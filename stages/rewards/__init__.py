"""Rewards of a completion: the built-in ones, and a user's own from a file."""
