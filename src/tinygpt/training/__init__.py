"""Logits -> loss -> update."""
