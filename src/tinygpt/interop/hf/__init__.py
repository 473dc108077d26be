"""Hugging Face's GPT-2: weights, tokenizers, and the hub."""
