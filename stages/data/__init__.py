"""Rows: from files and hubs, and the demonstration set."""
