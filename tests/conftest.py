"""What every test shares: one thread, the CPU, no network; a small corpus and a small run to start from."""

from __future__ import annotations

import os

# Before torch or DeepSpeed is imported anywhere: several processes share few cores, and no test takes a GPU by chance.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
