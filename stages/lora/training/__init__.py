"""Training that SFT and RL share: the loop, exact resume, checks of its health."""
