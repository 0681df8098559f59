"""Several sequences in one row without padding; what they share at their beginning is computed once."""
