"A wheel is all that is needed: built, installed into a folder, and used from outside the checkout."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# what a light install does without: the commands that only talk to Kaggle never ask for it
HEAVY = ('torch', 'transformers', 'peft', 'accelerate', 'bitsandbytes', 'datasets', 'sklearn', 'matplotlib')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The folder into which the wheel is installed."
    pytest.importorskip('wheel')
    root = tmp_path_factory.mktemp('wheel')
    for name in ('lib', 'nbs/kernels'):
        shutil.copytree(REPO/name, root/'source'/name, ignore=shutil.ignore_patterns('__pycache__', '*.egg-info'))
    for name in ('setup.py', 'MANIFEST.in', 'settings.ini', 'README.md', 'LICENSE', 'CHANGELOG.md'):
        shutil.copy(REPO/name, root/'source')
    pip = [sys.executable, '-m', 'pip', '-q']
    build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', root, root/'source']
    subprocess.run(build, check=True)
    wheel, = root.glob('*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target', root/'site', wheel], check=True)
    return root/'site'


def used(installed, folder, *args, code=None):
    "The output of a command of the installed library, in an empty folder."
    env = dict(os.environ, PYTHONPATH=str(installed), COLUMNS='80')
    command = ['-c', code] if code else ['-m', 'underdog', *args]
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def test_kernels_come_with_the_wheel(installed, tmp_path):
    assert 'train_csv' in used(installed, tmp_path, 'run', 'train', '--list').stdout
    assert used(installed, tmp_path, '--version').stdout.startswith('underdog 0.2.0+')
    refused = used(installed, tmp_path, 'run', 'train', '-p', 'lrr=1')
    assert refused.returncode == 1 and "did you mean lr" in refused.stderr and not list(tmp_path.iterdir())
    # tables and lists that the package reads, too
    assert 'gemma-2-9b' in used(installed, tmp_path, 'plan', '--rows', '100').stdout


def test_what_is_sent_to_kaggle_from_a_wheel_is_what_a_checkout_sends(installed, tmp_path):
    from underdog.kaggle.ship import library_bundle
    code = f'from underdog.kaggle.ship import library_bundle; library_bundle({str(tmp_path/"there")!r})'
    done = used(installed, tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    library_bundle(tmp_path/'here')
    files = lambda side: {str(f.relative_to(tmp_path/side)): f.read_bytes()
                          for f in (tmp_path/side).rglob('*') if f.is_file() and f.suffix in ('.py', '.ipynb')}
    assert files('there') == files('here')


def test_commands_that_only_talk_to_kaggle_need_no_torch(installed, tmp_path):
    code = f'''
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY}: raise ImportError(f'{{name}} is not installed')
sys.meta_path.insert(0, Without())
import pkgutil, importlib, underdog.kaggle
for module in pkgutil.iter_modules(underdog.kaggle.__path__):
    importlib.import_module(f'underdog.kaggle.{{module.name}}')
from underdog.console.main import main
main(['push', 'train', '-p', 'lrr=1'])
'''
    done = used(installed, tmp_path, code=code)
    assert "no parameter 'lrr'" in done.stderr and 'Traceback' not in done.stderr, done.stderr
