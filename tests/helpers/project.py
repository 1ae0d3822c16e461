"""Where things lie: the project, its sample corpus, and corpora outside it that some machines have."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SAMPLE = ROOT / "data_tools" / "sample_corpus" / "public_domain_en.jsonl.zst"
SHARED = Path(os.environ.get("TACO_SHARED_DATA", ROOT.parent / "shared" / "data"))
