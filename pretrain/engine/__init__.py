"""The one door to DeepSpeed: both of its engines behind one small interface."""
