"""What SFT and RL share: the training loop, exact resume, checks of its health."""
