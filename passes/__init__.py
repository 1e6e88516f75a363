"""Verbs: one pass a file, graph in, graph out; no torch, no printing."""
