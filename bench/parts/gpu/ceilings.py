"""The GPU's ceilings, and its clocks and power under load; the only line is JSON.

python bench/parts/gpu/ceilings.py [--dry]
"""

from __future__ import annotations

import argparse
import json

from shared.kernel_timing import measure_ceilings
from shared.machine import gpu_machine, gpu_state

REP_MS = 500.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="measures nothing")
    args = parser.parse_args()
    told: dict[str, object] = {**gpu_machine(), "dry": args.dry, "copy_gb_s": None}
    if not args.dry:
        ceilings = measure_ceilings(REP_MS)
        told |= {name: round(value, 1) for name, value in ceilings._asdict().items()}
        told["under_load"] = gpu_state()  # right behind the matmuls
    print(json.dumps(told))


if __name__ == "__main__":
    main()
