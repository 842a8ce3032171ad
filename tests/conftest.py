import importlib.util
import os
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

# no test reaches another machine: neither this process nor one that it starts
os.environ['PYTHONPATH'] = os.pathsep.join([str(OFFLINE), os.environ.get('PYTHONPATH', '')])
_spec = importlib.util.spec_from_file_location('offline', OFFLINE/'sitecustomize.py')
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))


slow = pytest.mark.skipif(
    not os.environ.get('UNDERDOG_SLOW'),
    reason='most of a minute of starting processes; its parts are tested by others; UNDERDOG_SLOW=1 runs it')


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
