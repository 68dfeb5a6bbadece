"""Means over several runs, as a Markdown table: python -m dmd_jax.evals.table "full method=/tmp/full-*" "without x=/tmp/without-*"

One row for the teacher of the first group, and one for the student of each.
"""

import glob
import json
import pathlib
import sys

import numpy as np


def main(arguments: list[str]):
    if not arguments or not all("=" in a for a in arguments):
        sys.exit('error: expected arguments of the form "name=pattern of workdirs".')
    groups = {
        name: [_read(path) for path in sorted(glob.glob(f"{pattern}/evaluation.json"))]
        for name, pattern in (a.split("=", 1) for a in arguments)
    }
    empty = [name for name, results in groups.items() if not results]
    if empty or not groups:
        sys.exit(f'error: no finished run matches {empty or "nothing"}; give "name=pattern of workdirs".')
    first = next(iter(groups.values()))
    rows = {"real images": [r["real"] for r in first], "teacher": [r["teacher"] for r in first]}
    rows |= {name: [r["student"] for r in results] for name, results in groups.items()}
    names = list(first[0]["student"])
    print(f"| mean of {len(first)} seeds (standard deviation) | {' | '.join(names)} |")
    print("| --- |" + " --- |" * len(names))
    for name, results in rows.items():
        cells = []
        for score in names:
            values = [r[score] for r in results]
            cells.append(f"{np.mean(values):.3f} ({np.std(values, ddof=1) if len(values) > 1 else 0:.3f})")
        print(f"| {name} | {' | '.join(cells)} |")
    speedup = [r["speedup"] for results in groups.values() for r in results]
    print(f"\nOne step is {np.mean(speedup):.1f} times faster per image ({min(speedup):.1f} to {max(speedup):.1f}).")


def _read(path):
    result = json.loads(pathlib.Path(path).read_text())
    teacher, student, *_ = result["nfe"]
    return {"real": result["real"], "teacher": result[teacher], "student": result[student], "speedup": result["speedup"]}


if __name__ == "__main__":
    main(sys.argv[1:])
