"""`taco train --processes N`: starts the ranks of a run on this machine, and ends with their exit code."""
