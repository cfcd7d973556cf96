"""`rlkit bench SUITE [--quick]`, or `python benchmarks/run.py SUITE [--quick]` from a checkout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import arsq
import dpo_speed
import dr_rpo
import dual_rl
import pmoe
import ppo_returns
import recoil
import sac_returns
import sac_speed

SUITES = {
    "sac-returns": sac_returns,
    "sac-speed": sac_speed,
    "dpo-speed": dpo_speed,
    "pmoe": pmoe,
    "ppo-returns": ppo_returns,
    "arsq": arsq,
    "dual-rl": dual_rl,
    "recoil": recoil,
    "dr-rpo": dr_rpo,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="rlkit bench", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=SUITES, help="one of: " + ", ".join(SUITES))
    parser.add_argument("--quick", action="store_true", help="at most two minutes, to see that it runs; own files")
    given = parser.parse_args()
    if given.suite is None:
        for name, module in SUITES.items():
            print(f"{name:<14} {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    print(SUITES[given.suite].main(quick=given.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
