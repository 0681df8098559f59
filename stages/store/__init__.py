"""What lies on disk: artifacts, checkpoints, digests."""
