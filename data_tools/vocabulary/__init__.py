"""A vocabulary learned from a sample of a corpus."""
