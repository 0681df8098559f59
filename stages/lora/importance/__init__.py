"""Importance of LoRA elements, and the regions and masks that follow from it."""
