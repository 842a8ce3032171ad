"Nothing stops a run at load: Kaggle's versions, small cards, packages that are old or absent."
import importlib
import os
import subprocess
import sys

import pytest
from conftest import REPO
from test_model import config

from underdog.model.backbone import load_backbone
from underdog.model.lora import hide_old_torchao

STUBS = REPO/'tests'/'stubs'


# ---- weights in few bits

@pytest.mark.parametrize('before', [None, '0'])
@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
def test_weights_are_quantized_one_at_a_time(bases, monkeypatch, quantization, before):
    "In transformers 5.0 threads would put all of them on the card in 16 bits; the environment is left as it was."
    import transformers.core_model_loading as loading
    def no_threads(*args, **kwargs): raise AssertionError('threads read the weights')
    monkeypatch.setattr(loading, 'ThreadPoolExecutor', no_threads)
    if before is None: monkeypatch.delenv('HF_DEACTIVATE_ASYNC_LOAD', raising=False)
    else: monkeypatch.setenv('HF_DEACTIVATE_ASYNC_LOAD', before)
    load_backbone(config(bases['llama'], quantization=quantization))
    assert os.environ.get('HF_DEACTIVATE_ASYNC_LOAD') == before


# ---- torchao

STEP = """
import sys
from peft.import_utils import is_torchao_available
try: is_torchao_available()
except ImportError: print('refused')   # the stand-in is as bad as the real one
from test_model import backward, config, load_model, make_batch
backward(load_model(config(sys.argv[1])), make_batch())
print('trained')
"""


def test_a_step_of_training_with_the_torchao_of_kaggles_image(bases):
    "0.10, for which peft raises an ImportError."
    path = os.pathsep.join([str(STUBS), str(REPO/'tests'), os.environ['PYTHONPATH']])
    done = subprocess.run([sys.executable, '-c', STEP, bases['bert']], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=path))
    assert done.stdout.split() == ['refused', 'trained'], done.stderr


@pytest.mark.parametrize('version, available', [('0.10.0', False), ('99.0', True), (None, False)])
def test_only_a_torchao_that_peft_refuses_is_hidden(tmp_path, monkeypatch, version, available):
    from peft.import_utils import is_torchao_available
    monkeypatch.delitem(sys.modules, 'torchao', raising=False)
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p != str(STUBS)])
    if version:
        (tmp_path/'torchao').mkdir()
        (tmp_path/'torchao'/'__init__.py').touch()
        (tmp_path/f'torchao-{version}.dist-info').mkdir()
        metadata = f'Metadata-Version: 2.1\nName: torchao\nVersion: {version}\n'
        (tmp_path/f'torchao-{version}.dist-info'/'METADATA').write_text(metadata)
        monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    is_torchao_available.cache_clear()
    try:
        hide_old_torchao()
        assert is_torchao_available() is available and 'torchao' not in sys.modules
    finally: is_torchao_available.cache_clear()
