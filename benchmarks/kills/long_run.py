"""Memory, open files and time of a long run of distill.py, in parts of it.

python -m benchmarks.kills.long_run --iterations 2000
"""

import argparse
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch

from benchmarks.kills.cases import BEFORE, CASES, Case, make_data
from benchmarks.kills.processes import run

PARTS = 5  # the first is to warm up
PACE = 0.2  # seconds between two looks


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kills.long_run", description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=2000)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="long_run_") as folder:
        base = Path(folder)
        run(lambda _: make_data(base), [], base, base / "printed")
        run(BEFORE["heads"].main, BEFORE["heads"].argv(base, base / "heads"), base, base / "printed")
        looks = watched(base, CASES[3], args.iterations)
    print("| iterations | memory, MB | open files | CPU time an iteration, ms |\n|---|---|---|---|")
    ends = [part * args.iterations // PARTS for part in range(PARTS + 1)]
    for first, last in pairwise(ends):
        part = [look for look in looks if first < look[0] <= last]
        pace = 1000 * (part[-1][3] - part[0][3]) / max(1, part[-1][0] - part[0][0])
        memory, files = mean(look[1] for look in part) / 1e6, {look[2] for look in part}
        print(f"| {first} to {last} | {memory:.1f} | {min(files)} to {max(files)} | {pace:.1f} |")


def watched(base: Path, case: Case, iterations: int) -> list[tuple[int, int, int, float]]:
    """Looks at a run, with an evaluation every 50 iterations: iteration, bytes, open files, seconds of its CPU."""
    more = ["--Iteration", str(iterations), "--eval_it", "50", "--no_draw"]
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = case.main([*case.argv(base, base / "run"), *more])
        finally:
            os._exit(code)
    looks, log, process = [], base / "run/distilled/metrics.jsonl", Path(f"/proc/{pid}")
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if log.exists():
            steps = log.read_text().count("Grand_Loss")
            memory = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
            seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            files = len(list((process / "fd").iterdir()))
            if memory:  # none is left of a process that has ended
                looks.append((steps, memory, files, seconds))
        time.sleep(PACE)
    assert os.waitpid(pid, 0)[1] == 0, "distill.py ended with an error"
    return looks


if __name__ == "__main__":
    main()
