"""Many runs of one table: what its cells share is made once."""
