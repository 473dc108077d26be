"""A model behind HTTP: an API like OpenAI's, and pages to watch and to play."""
