"""The two losses, as pure functions of tensors: masked language modelling and token contrast on global semantics."""
