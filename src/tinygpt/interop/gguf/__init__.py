"""GGUF, which llama.cpp reads."""
