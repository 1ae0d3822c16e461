"""Turns texts into token ids: cleaning, encoding, and worker processes."""
