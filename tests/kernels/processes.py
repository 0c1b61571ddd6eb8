"""Scripts run in a process of their own, of this folder or by their path: Triton decides at import if it interprets."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def in_a_process(script: str | Path, *arguments: str, **environment: str) -> str:
    """What the script prints; its failure is the test's."""
    path = Path(__file__).parent / script
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore", **environment}
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
