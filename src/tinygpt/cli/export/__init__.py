"""``tinygpt export``: a model in the form that other tools read."""

from __future__ import annotations

from cyclopts import App

app = App(name="export", help="Hand a model on: to Hugging Face, to llama.cpp, as a web page.")
app.command(f"{__name__}.hf:export_hf", name="hf", help="A folder that transformers loads.")
app.command(f"{__name__}.gguf:export_gguf", name="gguf", help="A file that llama.cpp loads.")
app.command(f"{__name__}.web:export_web", name="web", help="One web page that runs the model.")
