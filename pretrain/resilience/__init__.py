"""What can go wrong while a run goes on: signals, bad steps, hangs, stragglers, drift, limits of the machine."""
