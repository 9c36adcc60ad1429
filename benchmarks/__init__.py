"""Measurements; nothing in the package knows of them."""
