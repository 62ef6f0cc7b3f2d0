#!/usr/bin/env python
"""Says where a former script is now; the former names are links to this file."""

import sys
from pathlib import Path

PLACES = {
    "benchmark.py": "python -m tools.benchmarks",
    "calibrate_unknown.py": "regionspot calibrate",
    "convert_proposals.py": "tools/convert.py proposals",
    "convert_tokens.py": "tools/convert.py tokens",
    "gpu_check.py": "make gpu-check",
    "miniworld_demo.py": "miniworld demo",
    "pretrain_miniworld.py": "miniworld pretrain",
    "run_miniworld_ablations.py": "miniworld ablations",
    "run_table.py": "regionspot table",
}

if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    sys.exit(f"tools/{name} is now `{PLACES.get(name, 'regionspot')}`, with the same arguments")
