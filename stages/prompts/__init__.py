"""Text that models read and write: rendered prompts, and the answers and code in replies."""
