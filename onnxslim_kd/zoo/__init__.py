"""Architectures of the tutorials, with their parameter names."""
