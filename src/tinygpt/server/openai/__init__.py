"""The API that is like OpenAI's: what a request may hold, and the shapes of its answers."""
