"""The cost of a run before it is made: time, memory and lengths of each step."""
