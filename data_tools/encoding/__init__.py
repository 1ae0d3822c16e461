"""Texts to token ids: cleaning, encoding, and the worker processes that do it."""
