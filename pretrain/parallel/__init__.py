"""The processes of a run and their groups: launch, process grid, small collectives."""
