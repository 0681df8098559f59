"""Reading rows from files and from the hub, and the generated demonstration set."""
