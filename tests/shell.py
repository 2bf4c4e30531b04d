"""`lagm WORDS` as a person types it, without the seconds that a new process needs to import torch.

tests/test_cli.py and tests/test_wheel.py do it in processes of their own; where a test is about what a command does,
the words may as well go to `lagm.cli.main` here.
"""

import contextlib
import io
import os
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from lagm.cli import main


def lagm(*words: object, cwd: str | Path | None = None) -> CompletedProcess:
    """What the command says and returns, in the folder `cwd`; kernels that it starts use one thread."""
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.chdir(cwd or "."), mock.patch.dict(os.environ, OMP_NUM_THREADS="1"),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try: code = main([str(word) for word in words])
        except SystemExit as end: code = end.code  # of argparse
    return CompletedProcess(words, code, out.getvalue(), err.getvalue())
