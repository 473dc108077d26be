"""Weights and tokenizers in the formats of other tools, in and out.

``hf`` reads GPT-2 as Hugging Face keeps it, ``hf_export`` writes it, ``hub`` fetches it by name.
``parity`` is how either is proved.
"""
