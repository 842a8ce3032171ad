"Nothing stops a run at load: Kaggle's versions, small cards, packages that are old or absent."
import gc
import importlib
import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import REPO
from fixtures import DECODERS, FAMILIES, family_config
from safetensors.torch import load_file, save_file
from test_model import config, logits_of, make_batch, trained
from torch._subclasses import FakeTensorMode

from underdog.core import UserError
from underdog.inference.workers import _serve
from underdog.model.backbone import (_known_device, _liger_runs, _use_liger, host_embedding, load_backbone,
                                     load_bitsandbytes)
from underdog.model.lora import hide_old_torchao, without_lora
from underdog.model.merge import _check_card, load_merged, merge, save_adapter
from underdog.model.model import load_model
from underdog.model.settings import ModelConfig
from underdog.process import _environment

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


# ---- merged

def live_bytes():
    "Bytes of the tensors that Python holds."
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == 'cpu']
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize('tied', [True, False])
def test_a_merge_holds_one_file_in_memory(tmp_path, monkeypatch, tied):
    "From a base in several files, with a head over words, tied or not: equal logits, and never the model in memory."
    from transformers import AutoModelForCausalLM
    shape = family_config('llama', num_hidden_layers=6, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path/'base', max_shard_size='200KB')
    assert len(list((tmp_path/'base').glob('*.safetensors'))) > 2
    model = trained(config(tmp_path/'base', layers=5))
    save_adapter(model, tmp_path/'adapter')
    expected, largest = logits_of(model, make_batch()), 4*128*64
    del model
    # what is in memory when a file is written
    gc.collect()
    before, held = live_bytes(), []
    def write(tensors, *args, **kwargs):
        held.append(live_bytes() - before)
        return save_file(tensors, *args, **kwargs)
    monkeypatch.setattr(safetensors.torch, 'save_file', write)
    monkeypatch.setattr('underdog.model.merge._SHARD_BYTES', 100_000)
    cfg = merge(tmp_path/'adapter', tmp_path/'merged')
    files = list((tmp_path/'merged').glob('*.safetensors'))
    assert len(files) == len(held) > 5 and max(held) <= 100_000 + 4*largest
    names = [name for file in files for name in load_file(file)]
    assert len(names) == len(set(names)) and not [n for n in names if 'lm_head' in n or 'layers.5.' in n]
    torch.testing.assert_close(logits_of(load_merged(cfg), make_batch()), expected, rtol=1e-5, atol=1e-5)


def test_merged_weights_have_the_dtype_of_the_arithmetic(bases, tmp_path):
    model = trained(config(bases['llama']))
    save_adapter(model, tmp_path/'adapter')
    cfg = merge(tmp_path/'adapter', tmp_path/'merged', dtype='bfloat16', quantization='int8')
    weights = load_file(tmp_path/'merged'/'model-00001.safetensors')
    assert {t.dtype for t in weights.values()} == {torch.bfloat16} and cfg.quantization == 'int8'
    # rounded once, from the sum in fp32
    layer, key = without_lora(model.backbone).layers[0].mlp.up_proj, 'layers.0.mlp.up_proj.weight'
    with torch.no_grad(): expected = layer.weight + layer.get_delta_weight('default')
    assert torch.equal(weights[key], expected.bfloat16())


T4 = SimpleNamespace(total_memory=15.8e9)


def test_a_merged_9b_is_refused_on_a_t4_in_16_bits_only(monkeypatch):
    "Gemma-2-9B: 18.5 GB in 16 bits, of which the embedding stays on the host."
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: T4)
    sizes = dict(gate_proj=14336, up_proj=14336, down_proj=14336, q_proj=4096, k_proj=2048, v_proj=2048, o_proj=4096)
    stored = {f'model.layers.{i}.{n}.weight': ('', (size, 3584)) for i in range(42) for n, size in sizes.items()}
    stored['model.embed_tokens.weight'] = '', (256_000, 3584)
    for q in ('int8', 'nf4'): _check_card(ModelConfig('x', quantization=q), stored, 2, 'cuda:1')
    remedy = r'16.6 GB, and cuda:1 has 15.8; set quantization=int8 \(8.4 GB\) or quantization=nf4'
    with pytest.raises(UserError, match=remedy):
        _check_card(ModelConfig('x', quantization='none'), stored, 2, 'cuda:1')


def test_a_merge_does_not_overwrite_what_it_reads(bases, tmp_path):
    save_adapter(trained(config(bases['llama'])), tmp_path/'adapter')
    kept = {file: file.read_bytes() for file in [*(tmp_path/'adapter').rglob('*.*'), *Path(bases['llama']).glob('*.*')]}
    for out in (tmp_path/'adapter', tmp_path/'x'/'..'/'adapter', tmp_path, bases['llama']):
        with pytest.raises(UserError, match='would be lost'): merge(tmp_path/'adapter', out)
    assert all(file.read_bytes() == content for file, content in kept.items())


def test_merges_that_cannot_work_write_nothing(bases, tmp_path, monkeypatch):
    from transformers import AutoModel, BitsAndBytesConfig
    def refused(match):
        with pytest.raises(UserError, match=match): merge(tmp_path/'adapter', tmp_path/'out'/'merged')
        assert not list((tmp_path/'out').glob('*'))
    save_adapter(trained(config(bases['llama'])), tmp_path/'adapter')
    with monkeypatch.context() as m:
        m.setattr('underdog.model.merge.shutil.disk_usage', lambda folder: SimpleNamespace(free=1000))
        refused('are free in')
    # an adapter without one of its tensors
    file = tmp_path/'adapter'/'adapter.safetensors'
    tensors = load_file(file)
    del tensors['base_model.model.layers.1.mlp.up_proj.lora_B.default.weight']
    save_file(tensors, file)
    refused('up_proj.lora_B.default.weight.: missing')
    # a base that is stored in 4 bits
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')
    AutoModel.from_pretrained(bases['llama'], quantization_config=bits).save_pretrained(tmp_path/'base')
    save_adapter(trained(config(tmp_path/'base', quantization='nf4')), tmp_path/'adapter')
    refused('stored as nf4.*leave merge off')


# ---- several processes

class Silent:
    "A connection to a parent that has no work."
    def send(self, message): pass
    def recv(self): return None


@pytest.mark.parametrize('device, set_to', [('cuda:1', ['cuda:1']), ('cpu', [])])
def test_a_worker_makes_its_card_its_own_first(monkeypatch, device, set_to):
    "Triton launches its kernels on the current device, which is the first card until somebody says otherwise."
    events = []
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: events.append(str(device)))
    _serve(Silent(), lambda device: events.append('start'), device, threads=1)
    assert events == [*set_to, 'start']


def test_loading_a_model_makes_its_card_that_of_the_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: chosen.append(str(device)))
    for device in ('cuda:1', 'cpu', 'cuda'): _known_device(device)
    assert chosen == ['cuda:1']


def test_processes_of_one_machine_meet_on_its_loopback(monkeypatch):
    "Not those of several machines, and a person's choice stands."
    name = 'NCCL_SOCKET_IFNAME'
    monkeypatch.delenv(name, raising=False)
    assert _environment(2)[name] == 'lo' and name not in _environment(1) | _environment(2, machines=2)
    monkeypatch.setenv(name, 'eth0')
    assert _environment(2)[name] == 'eth0'


# ---- Liger

@pytest.fixture
def liger(monkeypatch):
    "What a stand-in for liger-kernel was asked for; like the real one it puts itself in transformers' place."
    calls = []
    def note(model, **asked):
        calls.append(asked)
        sys.modules[type(model).__module__].apply_rotary_pos_emb = None
    def silu(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        note(model, rope=rope, loss=cross_entropy or fused_linear_cross_entropy, rms_norm=rms_norm, swiglu=swiglu)
    def gelu(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, geglu=True, model=None):
        note(model, rope=rope, loss=cross_entropy or fused_linear_cross_entropy, rms_norm=rms_norm, geglu=geglu)
    patches = dict(llama=silu, mistral=silu, qwen2=silu, gemma2=gelu)
    functions = {f'apply_liger_kernel_to_{family}': patch for family, patch in patches.items()}
    module = SimpleNamespace(**functions)
    monkeypatch.setitem(sys.modules, 'liger_kernel', SimpleNamespace(transformers=module))
    monkeypatch.setitem(sys.modules, 'liger_kernel.transformers', module)
    monkeypatch.setattr('underdog.model.backbone._liger_runs', lambda liger, device: True)
    return calls


@pytest.mark.parametrize('family', FAMILIES)
def test_liger_is_used_where_it_can_be(bases, liger, family):
    "Norms and gated MLPs of this one model; no loss, no name of transformers, no family that is not tested."
    backbone = load_backbone(config(bases[family]))
    assert not liger   # not on a CPU
    assert _use_liger(backbone, torch.device('cuda:1')) is (family in DECODERS)
    if family not in DECODERS: return
    gate = 'geglu' if family == 'gemma2' else 'swiglu'
    assert liger == [{'rope': False, 'loss': False, 'rms_norm': True, gate: True}]
    assert sys.modules[type(backbone).__module__].apply_rotary_pos_emb is not None
    # another activation than Liger's keeps its MLP
    backbone.config.hidden_activation = backbone.config.hidden_act = 'relu'
    assert _use_liger(backbone, torch.device('cuda:1')) and liger[-1] == {**liger[0], gate: False}


def test_a_liger_that_is_absent_or_broken_stops_nothing(bases, monkeypatch, capsys):
    backbone = load_backbone(config(bases['llama']))
    monkeypatch.setitem(sys.modules, 'liger_kernel', None)
    assert _use_liger(backbone, torch.device('cuda:0')) is False
    def broken(size): raise RuntimeError('no C compiler')
    assert _liger_runs(SimpleNamespace(LigerRMSNorm=broken), torch.device('cuda:0')) is False
    assert 'no C compiler' in capsys.readouterr().out


def test_liger_has_the_names_that_we_ask_for():
    liger = pytest.importorskip('liger_kernel.transformers', reason='liger-kernel is not installed')
    for family in DECODERS:
        known = set(inspect.signature(getattr(liger, f'apply_liger_kernel_to_{family}')).parameters)
        gate = 'geglu' if family == 'gemma2' else 'swiglu'
        assert known == {'rope', 'cross_entropy', 'fused_linear_cross_entropy', 'rms_norm', gate, 'model'}
