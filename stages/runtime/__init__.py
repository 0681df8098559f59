"""Process utilities: ranks, cores and memory, and child processes that end with their parent."""
