"""Twenty runs that are ended at random moments and go on; `python -m benchmarks.kills` ends as many as one likes.

In a process of its own: runs are forked off it, which a process with threads does not stand.
"""

import json
import subprocess
import sys
from pathlib import Path


def test_twenty_kills(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kills", "--count", "20", "--output", str(tmp_path / "kills.md")]
    command += ["--cases", "buffer.py, heads", "distill.py, heads", "evaluate.py, export"]
    command += ["--ways", "SIGKILL", "Ctrl-C"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    trials = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert len(trials) == 20 and sum(any(trial["codes"]) for trial in trials) >= 10  # some are told after their end
