"Every module imports by itself, and cheaply where it can."
import subprocess
import sys
from pathlib import Path

import pytest

import underdog

LIBRARY = Path(underdog.__file__).parent


LIGHT = ['core', 'kernels', 'data.competition', 'data.csvfile', 'data.rows', 'data.answers', 'data.sample',
         'console.main', 'inference.blend', 'console.report',
         'kaggle.ship', 'kaggle.wheels', 'kaggle.push', 'kaggle.watch', 'kaggle.relay', 'kaggle.leaderboard']
HEAVY = ('torch', 'bitsandbytes', 'matplotlib', 'kaggle', 'transformers')


@pytest.mark.parametrize('module', LIGHT)
def test_light_modules_import_nothing_heavy(module):
    "Reading a csv or asking for help must not wait for torch, bitsandbytes or matplotlib."
    code = f'import sys, underdog.{module}; print(*[m for m in {HEAVY} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == '', done.stdout + done.stderr


def test_no_module_uses_fastcore():
    modules = [f for f in LIBRARY.rglob('*.py') if f.name != '_modidx.py']
    assert len(modules) > 40
    for f in modules: assert 'fastcore' not in f.read_text(), f
