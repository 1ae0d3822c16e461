"""BERT pretraining with the TACO objective under DeepSpeed.

Where to start reading: `trainer.py` (the loop), `engine/` (the one door to DeepSpeed),
`objectives/taco.py` (the loss), `data/batches.py` (where a micro-batch comes from).
"""

__version__ = "0.2.0.dev0"
