"""The process and its machine: ranks, cores and memory, children that end with their parent."""
