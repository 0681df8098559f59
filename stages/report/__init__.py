"""What was found, as pages that people look at."""
