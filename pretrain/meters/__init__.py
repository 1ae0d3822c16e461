"""What a run measures of its own speed: operations per second, and where the time of a step goes."""
