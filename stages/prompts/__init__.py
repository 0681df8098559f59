"""Text that models read and write: rendered prompts, and answers and code found in replies."""
