"""What a script does before its work: --help and a wrong flag wait for no library that they do not need."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each takes from a quarter of a second to two; torch, which the command line needs itself, is not among them.
SLOW = ("timm", "torchvision", "transformers", "matplotlib", "wandb", "datasets", "torch._dynamo")
PROGRAM = """
import runpy, sys
sys.argv = [{script!r}, *{argv!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as stop:
    print("code", stop.code, *(name for name in {slow!r} if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("script", ["buffer.py", "distill.py", "coreset.py", "evaluate.py"])
def test_help_and_a_wrong_flag_import_no_library_of_models(script):
    for argv, code in (["--help"], 0), (["--methd", "random"], 2):
        program = PROGRAM.format(script=script, argv=argv, slow=SLOW)
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == f"code {code}"
        assert ("--image_root" in done.stdout) == (argv == ["--help"])
