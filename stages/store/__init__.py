"""Storage on disk: artifacts, checkpoints, journals, and the digests that identify them."""
