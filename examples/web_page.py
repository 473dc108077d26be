"""Write the model that scripts/demo trained as one web page."""

from pathlib import Path

from tinygpt.interop.web.card import card

from tinygpt import load
from tinygpt.interop.web import export_web
from tinygpt.runs.folder import choose_checkpoint

run = Path("runs/demo")
model, tokenizer = load(run)
assert tokenizer is not None
made = export_web(
    model,
    tokenizer,
    Path("page.html"),
    title="A very small GPT",
    description="It learned from the documentation of Python, on a laptop, in a minute.",
    card=card(choose_checkpoint(run)),
)
print(f"{made.path}: {made.size / 1e6:.1f} MB, logits within {made.difference:.0e} of the model's")
