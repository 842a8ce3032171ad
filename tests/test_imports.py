"Every module imports by itself, and cheaply where it can."
import subprocess
import sys
from pathlib import Path

import pytest

import underdog

MODULES = sorted(p.stem for p in Path(underdog.__file__).parent.glob('*.py') if not p.stem.startswith('_'))


@pytest.mark.parametrize('module', ['core', 'competition', 'data', 'sample', 'cli', 'blend', 'report', 'ship', 'wheels', 'push', 'watch', 'relay', 'score'])
def test_light_modules_import_nothing_heavy(module):
    "Reading a csv or asking for help must not wait for torch, bitsandbytes or matplotlib."
    code = f"import sys, underdog.{module}; print(*[m for m in ('torch', 'bitsandbytes', 'matplotlib', 'kaggle', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == '', done.stdout + done.stderr


def test_no_module_uses_fastcore(): 
    for m in MODULES: assert 'fastcore' not in (Path(underdog.__file__).parent/f'{m}.py').read_text(), m
