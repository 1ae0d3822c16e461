"""What must hold on machines before a run."""
