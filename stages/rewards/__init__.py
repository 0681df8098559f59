"""Reward functions: the built-in ones, TRL's, and those of a user's file."""
