"""Tables of many runs: what is refused, what cells share, how a sweep goes on, and what a cell shows."""
