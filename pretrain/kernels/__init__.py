"""The kernels of a training step in Triton, beside the plain twins in torch that define them; one place chooses."""
