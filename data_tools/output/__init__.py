"""What a data program leaves behind: datasets that a killed run continues, journals, locks, records."""
