"""Where things lie, and what another process needs to import these helpers."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
