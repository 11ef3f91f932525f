# SPDX-License-Identifier: Apache-2.0
"""Compare the ratios of two runs: python -m bench.compare a.jsonl b.jsonl; fails unless 9 rows of 10 agree within 10 %.

A ratio that one of the runs itself says is in doubt is counted apart.
"""

import argparse
import sys
from pathlib import Path

from bench.rows import read
from bench.targets import doubtful

WITHIN, SHARE = 1.10, 0.9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=2, type=Path, metavar="ROWS")
    runs = [{(row["case"], row["implementation"]): row for row in read(path)} for path in parser.parse_args().files]
    compared = {key for key in runs[0].keys() & runs[1].keys() if runs[0][key]["ratio"] != 1}
    in_doubt = {key for key in compared if any(doubtful(run[key]) for run in runs)}
    a, b = ({key: run[key]["ratio"] for key in compared - in_doubt} for run in runs)
    factors = {key: max(a[key] / b[key], b[key] / a[key]) for key in a}
    agree = sum(factor <= WITHIN for factor in factors.values())
    for (case, implementation), factor in sorted(factors.items(), key=lambda item: -item[1]):
        if factor > WITHIN:
            print(f"{factor:6.3f}  {a[case, implementation]:.3f} {b[case, implementation]:.3f}  {case}: {implementation}")
    print(f"{agree} of {len(factors)} ratios agree within {WITHIN - 1:.0%}; {len(in_doubt)} are in doubt")
    return 0 if factors and agree >= SHARE * len(factors) else 1


if __name__ == "__main__":
    sys.exit(main())
