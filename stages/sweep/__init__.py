"""Tables of many runs: artifacts that several cells need are made once."""
