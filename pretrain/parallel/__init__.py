"""Who this process is among the others: launch, process grid, small collectives."""
