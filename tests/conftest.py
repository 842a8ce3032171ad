import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
from fixtures import FAMILIES, make_backbone, make_base, small_run
from hypothesis import HealthCheck, settings

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# laws hold on a busy machine, too
settings.register_profile('busy', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('busy')
REPO = Path(__file__).resolve().parents[1]
OFFLINE = REPO/'tests'/'offline'

# a Kaggle client of another version, in a folder of its own (pip install --target); for children, too
if os.environ.get('UNDERDOG_KAGGLE_CLIENT'):
    sys.path.insert(0, os.environ['UNDERDOG_KAGGLE_CLIENT'])
    os.environ['PYTHONPATH'] = os.pathsep.join([os.environ['UNDERDOG_KAGGLE_CLIENT'], os.environ.get('PYTHONPATH', '')])

# a shell that starts this in the background has Ctrl-C ignored, and children would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

# no test reaches another machine: neither this process nor one that it starts
os.environ['PYTHONPATH'] = os.pathsep.join([str(OFFLINE), os.environ.get('PYTHONPATH', '')])
sys.path.append(str(OFFLINE))
_spec = importlib.util.spec_from_file_location('offline', OFFLINE/'sitecustomize.py')
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))


slow = pytest.mark.skipif(
    not os.environ.get('UNDERDOG_SLOW'),
    reason='up to a minute of starting processes; its parts are tested by others; UNDERDOG_SLOW=1 runs it')


@pytest.fixture(scope='session')
def shared_data():
    "The folder of real preference data beside the checkout; tests that need it are skipped where it is not."
    folder = Path(os.environ.get('UNDERDOG_SHARED', REPO.parent/'shared'/'data'))
    if not (folder/'lmsys_train_1000.csv').exists():
        pytest.skip(f'no real preference data in {folder.name}/ beside the checkout')
    return folder


@pytest.fixture(scope='session')
def bases(tmp_path_factory):
    "family -> folder of a tiny backbone."
    from underdog.machine import quiet
    quiet()
    root = tmp_path_factory.mktemp('bases')
    return {family: make_backbone(root/family, family) for family in FAMILIES}


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    "A folder with a small generated competition and tiny base models with tokenizers."
    from underdog.data.sample import write_sample
    root = tmp_path_factory.mktemp('world')
    os.environ['UNDERDOG_CACHE'] = str(root/'cache')
    write_sample(root, n_train=60, n_test=20)
    for family in ('llama', 'bert', 'deberta'): make_base(root/family, family)
    return root


@pytest.fixture(scope='session')
def finished(world, tmp_path_factory):
    "A small run that is trained to its end."
    return small_run(world, tmp_path_factory.mktemp('finished')/'run')


@pytest.fixture(scope='session')
def joint(world, tmp_path_factory):
    "Another one, of a joint head."
    return small_run(world, tmp_path_factory.mktemp('joint')/'run', head='joint')


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A Kaggle of its own for a test, and nothing that an earlier one left."
    from kaggle_server import KaggleServer
    for name in ('UNDERDOG_HOME', 'UNDERDOG_CACHE'): monkeypatch.setenv(name, str(tmp_path/name))
    kaggle = KaggleServer(tmp_path/'server').start()
    yield kaggle
    kaggle.stop()


@pytest.fixture
def hub(server):
    "An account there, which does not wait long."
    from underdog.kaggle.account import Hub
    return Hub(poll_s=.05, first_pause_s=.01)


COUNTER = '''import json, os, time
from pathlib import Path
before = Path(os.environ['UNDERDOG_KAGGLE'])/'input'/resume_from/'status.json'
step = json.loads(before.read_text())['step'] if resume_from else 0
if step == bad: raise ValueError('a bad step')
time.sleep(nap)
step = min(10, step + 4)
Path(out).mkdir()
status = dict(state='finished' if step == 10 else 'paused', step=step, of=10)
Path(out, 'status.json').write_text(json.dumps(status))'''
PARAMETERS = "out = 'run'\nresume_from = ''\ntime_limit = -1.0\nnap = 0.0\nbad = -1"


@pytest.fixture
def count(tmp_path):
    "A kernel that takes three sessions to count to ten."
    from kaggle_server import write_notebook
    return write_notebook(tmp_path/'count.ipynb', COUNTER, parameters=PARAMETERS)
