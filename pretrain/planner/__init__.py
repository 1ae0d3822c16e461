"""What a run would need: memory per rank, and the stages of a pipeline."""
