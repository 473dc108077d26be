"""Connections and requests, knowing nothing of models: limits, keys, bodies, files, errors."""
