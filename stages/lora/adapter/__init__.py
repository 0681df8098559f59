"""The LoRA adapter: building, saving, merging and sharding it, and layers that train only some elements."""
