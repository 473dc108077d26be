"""Conversations: their template, and what a model learns of them."""
