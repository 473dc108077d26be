"""Sphinx: `python -m sphinx docs docs/_build` with the extra `docs`."""

from tinygpt.config import __version__

project = "TinyGPT"
author = "The TinyGPT authors"
copyright = "2026, The TinyGPT authors"
version = release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "TinyGPT"
