"""What a script does before its work: --help and a wrong flag wait for no library that they do not need."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each takes from a quarter of a second to two; torch, which the command line needs itself, is not among them.
SLOW = ("timm", "torchvision", "transformers", "matplotlib", "wandb", "datasets", "torch._dynamo")
# In one process, as torch takes most of the time; a library that any of them imports is named for those after it too.
PROGRAM = f"""
import runpy, sys
for script in ("buffer.py", "distill.py", "coreset.py", "evaluate.py"):
    for argv in ["--help"], ["--methd", "random"]:
        sys.argv = [script, *argv]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            slow = [name for name in {SLOW} if name in sys.modules]
            print("told", script, stop.code, *slow, file=sys.stderr)
"""


def test_help_and_a_wrong_flag_import_no_library_of_models():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    told = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("told ")]
    scripts = ("buffer.py", "distill.py", "coreset.py", "evaluate.py")
    assert told == [[script, code] for script in scripts for code in ("0", "2")]
    assert done.stdout.count("usage: ") == 4 and done.stderr.count("error:") == 4
