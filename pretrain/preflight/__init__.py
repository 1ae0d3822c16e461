"""Checks of machines, data and network before a run."""
