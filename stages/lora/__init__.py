"""LoRA at element level: the adapter, importance, regions, packed weights and what SFT and RL share."""
