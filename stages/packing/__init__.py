"""Padding-free batches: several sequences packed into one row, with shared prefixes computed once."""
