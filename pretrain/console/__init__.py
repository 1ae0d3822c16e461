"""What programs share at the console: their standard streams, and words for what a machine refuses."""
