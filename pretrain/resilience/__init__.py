"""What can go wrong during a run: signals, bad steps, hangs, stragglers, drift, limits of the machine."""
