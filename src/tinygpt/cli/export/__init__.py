"""``tinygpt export``: a model in the form that other tools read."""

from __future__ import annotations

from cyclopts import App

app = App(name="export", help="Hand a model on: to Hugging Face, to llama.cpp, as a web page.")
app.command(f"{__name__}.hf:export_hf", name="hf")
app.command(f"{__name__}.gguf:export_gguf", name="gguf")
app.command(f"{__name__}.web:export_web", name="web")
