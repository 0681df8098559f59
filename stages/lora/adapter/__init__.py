"""The LoRA adapter, and the layers in which only its active elements are parameters."""
