"""The configuration of a run: its typed sections, how they are read, and the checks between them."""
