"Nothing stops a run at load: Kaggle's versions, small cards, packages that are old or absent."
import importlib
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import REPO
from test_model import config, logits_of, make_batch
from torch._subclasses import FakeTensorMode

from underdog.model.backbone import host_embedding, load_backbone, load_bitsandbytes
from underdog.model.lora import hide_old_torchao
from underdog.model.model import load_model

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
from functools import partial
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


# ---- an embedding on the host

class Scaled(torch.nn.Embedding):
    "As Gemma-2's in later versions of transformers: its rows times a buffer."
    def __init__(self, *size):
        super().__init__(*size)
        self.register_buffer('scale', torch.tensor(8.), persistent=False)

    def forward(self, ids): return super().forward(ids)*self.scale


def test_an_embedding_moves_to_the_host_with_its_buffers():
    "Tensors that only say `cuda`: no card is needed."
    with FakeTensorMode():
        with torch.device('cuda'): embedding = Scaled(50, 4).requires_grad_(False)
        assert embedding.weight.is_cuda and embedding.scale.is_cuda
        host_embedding(embedding)
    tensors = dict(embedding.named_parameters()) | dict(embedding.named_buffers())
    assert {name: t.device.type for name, t in tensors.items()} == dict(weight='cpu', scale='cpu')
    assert not embedding.weight.requires_grad and list(embedding.state_dict()) == ['weight']


def test_a_row_travels_once_and_comes_back_in_its_place():
    embedding, ids = Scaled(50, 4), torch.tensor([[3, 3, 7], [0, 49, 3]])
    expected, looked_up = embedding(ids), []
    forward = embedding.forward
    def note(ids):
        looked_up.append(ids.tolist())
        return forward(ids)
    embedding.forward = note
    host_embedding(embedding)
    assert torch.equal(embedding(ids), expected) and looked_up == [[0, 3, 7, 49]]


# ---- a folder that is stored in few bits

@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
@pytest.mark.parametrize('family', ['llama', 'gemma2'])
def test_a_folder_stored_in_bf16_computes_in_fp16(bases, tmp_path, family, quantization):
    "As ...-bnb-4bit are stored: nothing stays bf16, and no activation becomes fp32 because the two were mixed."
    from transformers import AutoModel, BitsAndBytesConfig
    load_bitsandbytes()
    bits = dict(nf4=dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16),
                int8=dict(load_in_8bit=True))[quantization]
    stored = AutoModel.from_pretrained(bases[family], quantization_config=BitsAndBytesConfig(**bits),
                                       device_map={'': 'cpu'}, dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path/'base')
    model = load_model(config(tmp_path/'base', quantization=quantization, dtype='float16', rank=0))
    backbone = model.backbone
    # what it holds
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    assert not [name for name, t in tensors.items() if t.dtype == torch.bfloat16]
    states = [m.weight.quant_state for m in backbone.modules() if hasattr(m, 'compute_dtype')]
    assert {state.dtype for state in states} == ({torch.float16} if quantization == 'nf4' else set())
    # what it computes
    seen = {}
    def note(name, module, args, output):
        for t in output if isinstance(output, tuple) else (output,):
            if isinstance(t, torch.Tensor) and t.is_floating_point(): seen[name] = t.dtype
    for name, module in backbone.named_modules():
        if not list(module.children()): module.register_forward_hook(partial(note, name))
    assert logits_of(model, make_batch()).isfinite().all()
    assert len(seen) > 10 and {name: dtype for name, dtype in seen.items() if dtype != torch.float16} == {}
