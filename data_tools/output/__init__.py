"""Output of the data programs: resumable datasets, journals, locks, recorded options."""
