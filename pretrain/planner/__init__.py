"""Estimates of what a run needs: memory per rank, and the stages of a pipeline."""
