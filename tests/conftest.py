"""Fixtures shared by the tests: where the real films are, and a small phantom study's parts."""
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A shell ignores SIGINT for what it starts in the background, and commands inherit that: those that a test stops would not hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def films():
    "The folder of real chest films (`$CXRLG_DATA`, or `../shared/data` beside the repository); skips when absent"
    folder = Path(os.environ.get('CXRLG_DATA', ROOT.parent / 'shared' / 'data'))
    if not (folder / 'nih128').is_dir(): pytest.skip(f'no real films in {folder}: set CXRLG_DATA')
    return folder
