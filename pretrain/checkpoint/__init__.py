"""Checkpoints that prove themselves: their manifest, state files, commit protocol and tools."""
