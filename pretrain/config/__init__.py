"""What a run is: its typed sections, their reading, and what must hold between them."""
