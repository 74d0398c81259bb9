"""Losses, the optimizer step and the loop around it."""
