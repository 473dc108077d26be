"""Many requests decoded together, in one thread that owns tinygrad."""
