"""Connections and requests, without anything of models: limits, keys, bodies, files, errors."""
