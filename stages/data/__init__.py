"""Rows from files and from the hub, and the demonstration set."""
