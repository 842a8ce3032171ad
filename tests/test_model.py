"Laws of the model: LoRA, heads, quantization, padding, save/load/merge; tiny backbones made from configs."
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures import DECODERS, FAMILIES, family_config
from safetensors.torch import load_file, save_file

from underdog.core import UserError
from underdog.machine import quiet
from underdog.text.batch import Batch
from underdog.model.backbone import load_backbone
from underdog.model.folder import base_hash
from underdog.model.lora import layer_range, linear_layers, lora_targets, without_lora
from underdog.model.memory import blocks, recompute
from underdog.model.merge import load_adapter, load_merged, merge, save_adapter
from underdog.model.model import adapter_parameters, head_parameters, load_model
from underdog.model.settings import ModelConfig


def config(base, **settings):
    "Settings of a small unquantized model on the backbone `base`."
    return ModelConfig(str(base), **dict(rank=4, quantization='none') | settings)


def make_batch(head='pair', rows=2, seed=0, swapped=None, pad_left=0, pad_right=0):
    "`rows` rows of different lengths, padded on either side; `swapped` rows have their sequences exchanged (pair)."
    rng = np.random.default_rng(seed)
    swapped = np.zeros(rows, bool) if swapped is None else np.asarray(swapped, bool)
    ids = [rng.integers(5, 128, n) for n in rng.integers(6, 11, rows if head == 'joint' else 2*rows)]
    if head == 'pair':
        answers = list(zip(ids[:rows], ids[rows:], swapped))
        ids = [b if s else a for a, b, s in answers] + [a if s else b for a, b, s in answers]
    width = pad_left + max(map(len, ids)) + pad_right
    tokens, mask = np.zeros((len(ids), width), np.int64), np.zeros((len(ids), width), np.int64)
    pool, read = np.zeros((len(ids), width), np.float32), []
    for i, x in enumerate(ids):
        start = width - len(x) if pad_left else 0   # left: every sequence ends at the right edge
        end = start + len(x)
        tokens[i, start:end] = x
        mask[i, start:end] = 1
        pool[i, start + 3:end] = 1
        read.append(end - 1)
    tokens, mask, pool, swapped = map(torch.from_numpy, (tokens, mask, pool, swapped))
    return Batch(tokens, mask, pool, torch.tensor(read), rows=torch.arange(rows), swapped=swapped)


def trained(cfg, seed=1, device='cpu'):
    "A model with LoRA and head as if trained: every trainable value moved away from its start."
    model = load_model(cfg, device)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model) + head_parameters(model): p.copy_(.1*torch.randn(p.shape, generator=g))
    return model.eval()


@torch.no_grad()
def logits_of(model, batch): return model.eval()(batch)


def backward(model, batch):
    "The model after one step's backward pass."
    torch.manual_seed(0)   # BERT and DeBERTa have dropout of their own
    model.train().zero_grad()
    logits = model(batch)
    torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    return model


# ---- families and precisions

@pytest.mark.parametrize('head', ['pair', 'joint'])
@pytest.mark.parametrize('family', FAMILIES)
def test_only_lora_and_head_learn_and_in_fp32(bases, family, head):
    model = load_model(config(bases[family], head=head))
    backward(model, make_batch(head))
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all('lora_' in n or n.startswith('head.') for n in learning)
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert len(learning) == len(adapter_parameters(model)) + len(head_parameters(model))
    assert all(p.grad is None for n, p in model.named_parameters() if n not in learning)
    # B starts at 0, so A's first gradient is 0; B's is not
    moving = [p for n, p in learning.items() if 'lora_B' in n or n == 'head.score.weight']
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moving)
    assert sum('lora_B' in n for n in learning) == len(linear_layers(load_backbone(model.cfg)))


@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
@pytest.mark.parametrize('family', ['llama', 'gemma2', 'deberta', 'bert'])
def test_gradients_survive_an_evaluation(bases, family, quantization):
    "bitsandbytes' AVX512-BF16 kernel makes LoRA's gradients None or wrong after an evaluation: they are compared."
    model, batch = trained(config(bases[family], quantization=quantization)), make_batch()
    first = [p.grad.clone() for p in adapter_parameters(backward(model, batch))]
    logits = logits_of(model, batch)
    backward(model, batch)
    for p, before in zip(adapter_parameters(model), first):
        assert p.grad is not None and p.grad.abs().sum() > 0
        torch.testing.assert_close(p.grad, before, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits_of(model, batch), logits)


@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
@pytest.mark.parametrize('family', ['mistral', 'qwen2', 'gemma2', 'deberta'])
def test_quantized_is_near_the_full_model(bases, family, quantization):
    full = logits_of(trained(config(bases[family])), make_batch())
    small = logits_of(trained(config(bases[family], quantization=quantization)), make_batch())
    assert not torch.equal(full, small)   # it is quantized indeed
    assert (full - small).abs().max() < .25*full.abs().max() + .1
    assert small.dtype == torch.float32


def test_every_layer_is_quantized(bases):
    for family in FAMILIES:
        modules = dict(load_backbone(config(bases[family], quantization='nf4')).named_modules())
        names = linear_layers(load_backbone(config(bases[family])))
        assert {type(modules[n]).__name__ for n in names} == {'Linear4bit'}


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_keeps_trainables_in_fp32(bases, dtype):
    model = load_model(config(bases['llama'], dtype=dtype))
    assert {p.dtype for p in adapter_parameters(model) + head_parameters(model)} == {torch.float32}
    assert next(p for p in model.backbone.parameters() if not p.requires_grad).dtype == getattr(torch, dtype)
    backward(model, make_batch())
    assert logits_of(model, make_batch()).dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in adapter_parameters(model))


def test_attention_is_planned_and_gemma_has_no_softcap(bases):
    used = {f: load_backbone(config(bases[f])).config for f in FAMILIES}
    expected = {f: 'eager' if f == 'deberta' else 'underdog' for f in FAMILIES}
    assert {f: c._attn_implementation for f, c in used.items()} == expected
    assert used['gemma2'].attn_logit_softcapping is None and not used['gemma2'].use_cache


# ---- LoRA

@pytest.mark.parametrize('quantization', ['none', 'nf4', 'int8'])
def test_lora_is_wx_plus_scaled_bax(bases, quantization):
    model = trained(config(bases['llama'], quantization=quantization, alpha=10))
    layer = without_lora(model.backbone).layers[1].mlp.gate_proj
    A, B = layer.lora_A['default'].weight, layer.lora_B['default'].weight
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 10/4*x @ A.T @ B.T, rtol=1e-4, atol=1e-5)


def test_lora_changes_nothing_before_training(bases):
    cfg = config(bases['qwen2'], rank=16)
    plain = load_model(cfg, tuned=False)
    assert torch.equal(logits_of(load_model(cfg), make_batch()), logits_of(plain, make_batch()))


def test_targets_and_range(bases):
    model = load_model(config(bases['llama'], targets='q_proj, v_proj', lora_layers='1:'))
    learning = [n for n, p in model.backbone.named_parameters() if p.requires_grad]
    names = {n.split('.lora_')[0].removeprefix('base_model.model.') for n in learning}
    assert names == {'layers.1.self_attn.q_proj', 'layers.1.self_attn.v_proj'}
    bert = load_backbone(config(bases['bert']))
    assert lora_targets(bert, 'attention.output.dense', ':1') == ['encoder.layer.0.attention.output.dense']


@pytest.mark.parametrize('text, layers', [
    ('', range(10)),
    ('8:', [8, 9]),
    ('2:4', [2, 3]),
    ('-2:', [8, 9]),
    (':1', [0]),
])
def test_a_slice_of_layers(text, layers):
    assert list(layer_range(text, 10)) == list(layers)


@pytest.mark.parametrize('text', ['2:1', '11:', ':12', '-11:', '3', 'a:b', ':0'])
def test_a_slice_without_layers_or_beyond_them_is_refused(text):
    with pytest.raises(UserError, match='lora_layers'): layer_range(text, 10)


def test_seed_decides_the_start(bases):
    a, b, c = (load_model(config(bases['llama'], rank=16, seed=s)) for s in (1, 1, 2))
    same = [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())]
    assert all(same) and a.head_source == 'seeded'
    assert not torch.equal(a.head.score.weight, c.head.score.weight)
    start = logits_of(a, make_batch()).softmax(-1)
    assert (start - 1/3).abs().max() < .05


# ---- heads and order

@pytest.mark.parametrize('family', ['gemma2', 'deberta'])
@pytest.mark.parametrize('n_classes', [2, 3])
def test_pair_is_symmetric(bases, family, n_classes):
    model = trained(config(bases[family], n_classes=n_classes))
    given, mixed = make_batch(rows=3), make_batch(rows=3, swapped=[True, False, True])
    # the order shown does not matter
    torch.testing.assert_close(logits_of(model, mixed), logits_of(model, given), rtol=1e-5, atol=1e-6)
    # other answers: classes exchanged, up to the order in which a matrix product adds
    sequences = ('input_ids', 'attention_mask', 'pool_mask', 'read')
    exchanged = replace(given, **{k: getattr(given, k).roll(3, 0) for k in sequences})
    swap = [1, 0, 2][:n_classes]
    torch.testing.assert_close(logits_of(model, exchanged), logits_of(model, given)[:, swap], rtol=1e-5, atol=1e-6)
    x = torch.randn(6, 64)
    with torch.no_grad(): torch.testing.assert_close(model.head(x.roll(3, 0)), model.head(x)[:, swap])


def test_pair_is_davidsons_model_with_a_tie_for_each_row(bases):
    model = trained(config(bases['llama']))
    a, b, tie = logits_of(model, make_batch()).T
    with torch.no_grad(): first, second = model.features(make_batch()).chunk(2)
    by_row = model.head.tie_score.weight[0].detach() @ (first + second).T/2
    torch.testing.assert_close(tie, (a + b)/2 + by_row + model.head.tie.detach(), rtol=1e-4, atol=1e-5)
    assert (by_row[0] - by_row[1]).abs() > 1e-3


@pytest.mark.parametrize('head', ['pair', 'combined'])
def test_a_tie_for_each_row_begins_at_nothing_and_changes_no_other_start(bases, head):
    fresh = load_model(config(bases['llama'], head=head)).head
    assert not fresh.tie_score.weight.any() and fresh.score.weight.any()
    assert load_model(config(bases['llama'], head=head, n_classes=2)).head.tie_score is None


def test_a_head_saved_before_ties_by_row_still_loads(bases, tmp_path):
    model = trained(config(bases['llama']))
    model.head.tie_score.weight.data.zero_()
    save_adapter(model, tmp_path/'adapter')
    expected, file = logits_of(model, make_batch()), tmp_path/'adapter'/'head.safetensors'
    state = load_file(file)
    del state['tie_score.weight']
    save_file(state, file)
    assert torch.equal(logits_of(load_adapter(tmp_path/'adapter'), make_batch()), expected)
    merged = load_merged(merge(tmp_path/'adapter', tmp_path/'merged'))
    torch.testing.assert_close(logits_of(merged, make_batch()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('n_classes', [2, 3])
def test_joint_maps_swapped_rows_back(bases, n_classes):
    model = trained(config(bases['llama'], head='joint', n_classes=n_classes))
    batch = make_batch('joint', rows=3)
    shown = logits_of(model, batch)
    back = logits_of(model, replace(batch, swapped=torch.tensor([True, False, True])))
    swap = [1, 0, 2][:n_classes]
    assert torch.equal(back, torch.stack([shown[0, swap], shown[1], shown[2, swap]]))


@pytest.mark.parametrize('head', ['pair', 'joint'])
def test_right_padding_changes_nothing(bases, head):
    for family in FAMILIES:
        model = trained(config(bases[family], head=head))
        for pooling in ('mean', 'read', 'last', 'first'):
            model.cfg = replace(model.cfg, pooling=pooling)
            padded, tight = logits_of(model, make_batch(head, pad_right=5)), logits_of(model, make_batch(head))
            torch.testing.assert_close(padded, tight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('family', ['llama', 'mistral', 'gemma2', 'qwen2', 'deberta'])
def test_left_padding_changes_nothing(bases, family):
    "But for BERT, which counts positions from the left edge."
    model = trained(config(bases[family]))
    for pooling in ('mean', 'last', 'first'):
        model.cfg = replace(model.cfg, pooling=pooling)
        left = logits_of(model, make_batch(pad_left=5))
        torch.testing.assert_close(left, logits_of(model, make_batch()), rtol=1e-4, atol=1e-5)
        assert all(torch.isfinite(p.grad).all() for p in adapter_parameters(backward(model, make_batch(pad_left=5))))


def test_an_empty_pool_reads_the_last_token(bases):
    model, batch = trained(config(bases['llama'])), make_batch()
    batch.pool_mask[0] = 0
    read = logits_of(trained(config(bases['llama'], pooling='read')), batch)
    assert torch.allclose(logits_of(model, batch)[0, 0], read[0, 0])


# ---- a head that the folder brings

@pytest.mark.parametrize('family', ['llama', 'gemma2', 'bert', 'deberta'])
@pytest.mark.parametrize('head', ['pair', 'joint'])
def test_stored_head_gives_the_classifiers_logits(tmp_path, family, head):
    from transformers import AutoModelForSequenceClassification
    quiet()
    torch.manual_seed(0)
    extra = dict(deberta=dict(pooler_hidden_act='gelu', pooler_hidden_size=64, pooler_dropout=0),
                 gemma2=dict(attn_logit_softcapping=None)).get(family, {})
    stored = family_config(family, num_labels=1 if head == 'pair' else 3, **extra)
    classifier = AutoModelForSequenceClassification.from_config(stored).eval()
    classifier.save_pretrained(tmp_path/'reward')
    batch = make_batch(head)
    with torch.no_grad():
        expected = classifier(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    # ours with that head
    model = load_model(config(tmp_path/'reward', head=head))
    assert model.head_source == 'checkpoint' and model.cfg.pooling == ('last' if family in DECODERS else 'first')
    logits = logits_of(model, batch)
    if head == 'joint': torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    else:   # a score's bias cancels between the two answers
        margin = (expected[:2] - expected[2:])[:, 0]
        torch.testing.assert_close(logits[:, 0] - logits[:, 1], margin, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path/'adapter')
    assert torch.equal(logits_of(load_adapter(tmp_path/'adapter'), batch), logits)
    # of another shape: not used, and said so
    other = load_model(config(tmp_path/'reward', head='joint' if head == 'pair' else 'pair'))
    assert other.head_source == 'seeded'


# ---- save, load, merge

FRESH = """# warm
import sys, torch
from underdog.model.merge import load_adapter
from underdog.text.batch import Batch
from safetensors.torch import load_file, save_file
batch = Batch(**load_file('batch.safetensors'))
with torch.no_grad(): save_file({q: load_adapter(q)(batch) for q in sys.argv[1:]}, 'logits.safetensors')
"""


def test_reload_in_a_fresh_process_gives_equal_logits(bases, tmp_path):
    batch, expected = make_batch(rows=3), {}
    save_file({k: v.contiguous() for k, v in vars(batch).items()}, tmp_path/'batch.safetensors')
    for q in ('none', 'nf4'):
        model = trained(config(bases['gemma2'], quantization=q, lora_layers='1:'))
        save_adapter(model, tmp_path/q)
        expected[q] = logits_of(model, batch)
    command = [sys.executable, '-c', FRESH, *expected]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path/'logits.safetensors')
    assert all(torch.equal(logits[q], expected[q]) for q in expected)


def merged_copy(model, folder):
    "The model saved to `folder`, merged there and loaded again."
    save_adapter(model, folder/'adapter')
    return load_merged(merge(folder/'adapter', folder/'merged'))


@pytest.mark.parametrize('family', ['llama', 'bert', 'deberta'])
@pytest.mark.parametrize('head', ['pair', 'joint'])
def test_merged_gives_equal_logits(bases, tmp_path, family, head):
    model, batch = trained(config(bases[family], head=head)), make_batch(head)
    merged = merged_copy(model, tmp_path)
    torch.testing.assert_close(logits_of(merged, batch), logits_of(model, batch), rtol=1e-5, atol=1e-5)
    assert not adapter_parameters(merged)
    assert [f.name for f in (tmp_path/'merged').glob('*.safetensors')] == ['model-00001.safetensors']


def test_merged_keeps_the_first_layers_only(bases, tmp_path):
    model, batch = trained(config(bases['gemma2'], layers=1)), make_batch()
    assert len({i for i in linear_layers(load_backbone(model.cfg)).values()}) == 1
    merged = merged_copy(model, tmp_path)
    torch.testing.assert_close(logits_of(merged, batch), logits_of(model, batch), rtol=1e-5, atol=1e-5)


def test_adapter_of_rank_0_is_the_head_alone(bases, tmp_path):
    model = trained(config(bases['llama'], rank=0))
    assert not adapter_parameters(model)
    backward(model, make_batch())
    merged = merged_copy(model, tmp_path)
    for again in (load_adapter(tmp_path/'adapter'), merged):
        assert torch.equal(logits_of(again, make_batch()), logits_of(model, make_batch()))


# ---- mistakes

def test_base_hash_follows_content_not_place(bases, tmp_path):
    copy = tmp_path/'copy'
    shutil.copytree(bases['llama'], copy)
    assert base_hash(copy) == base_hash(bases['llama']) != base_hash(bases['mistral'])
    model = trained(config(bases['llama']))
    save_adapter(model, tmp_path/'adapter')
    weights = load_file(copy/'model.safetensors')
    save_file({k: v + 1 for k, v in weights.items()}, copy/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(UserError) as e: load_adapter(tmp_path/'adapter', base=copy)
    assert base_hash(bases['llama']) in str(e.value) and base_hash(copy) in str(e.value)


DAMAGES = ['head missing', 'head shape', 'head extra', 'lora missing', 'lora shape', 'head file', 'truncated']


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_adapters_are_refused(bases, tmp_path, damage):
    folder = tmp_path/'adapter'
    save_adapter(trained(config(bases['llama'])), folder)
    file = next(f for f in folder.glob('*.safetensors') if ('head' in f.name) != damage.startswith('lora'))
    state = load_file(file)
    key = 'score.weight' if not damage.startswith('lora') else sorted(state)[0]
    if damage == 'head file': file.unlink()
    elif damage == 'truncated': file.write_bytes(file.read_bytes()[:-8])
    else:
        if damage.endswith('missing'): del state[key]
        elif damage.endswith('shape'): state[key] = torch.zeros(1, 3)
        else: state['surprise'] = torch.zeros(1)
        save_file(state, file)
    with pytest.raises(UserError, match=file.name): load_adapter(folder)


def test_missing_backbone_weights_are_named(bases, tmp_path):
    shutil.copytree(bases['llama'], tmp_path/'base')
    weights = load_file(tmp_path/'base'/'model.safetensors')
    del weights['layers.1.mlp.up_proj.weight']
    save_file(weights, tmp_path/'base'/'model.safetensors', metadata=dict(format='pt'))
    for q in ('none', 'nf4'):
        with pytest.raises(UserError, match=r'would be random: layers\.1\.mlp\.up_proj\.weight'):
            load_model(config(tmp_path/'base', quantization=q))


def test_folders_that_are_no_model(bases, tmp_path):
    base = tmp_path/'base'
    def refused(match):
        with pytest.raises(UserError, match=match): load_model(config(base))
    refused('no such file or folder')
    base.write_text('')
    refused('not a folder')
    base.unlink()
    base.mkdir()
    refused('no config.json')
    shutil.copy(bases['llama']/'config.json', base)
    refused('weights missing: model.safetensors')
    (base/'pytorch_model.bin').write_bytes(b'x')
    refused('only pickled weights')
    index = base/'model.safetensors.index.json'
    for content in ('[]', '{}', '{"weight_map": []}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": null}}'):
        index.write_text(content)
        refused('index.json: ')
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    (base/'model-1.safetensors').write_bytes(b'x')
    (base/'pytorch_model.bin').unlink()
    refused('weights missing: model-2.safetensors')
    index.unlink()
    (base/'model.safetensors').write_bytes((bases['llama']/'model.safetensors').read_bytes()[:1000])
    refused('weights not readable')
    (base/'config.json').write_text('{"model_type": "no-such-model"}')
    refused('does not know this model')


@pytest.mark.parametrize('wrong, match', [
    (dict(layers=3), 'has 2 layers'), (dict(lora_layers='1:5'), 'the model has 2 layers'),
    (dict(targets='q_prj'), 'self_attn.q_proj'), (dict(targets=','), 'no linear layer')])
def test_settings_that_do_not_fit_the_model(bases, wrong, match):
    with pytest.raises(UserError, match=match): load_model(config(bases['llama'], **wrong))


@pytest.mark.parametrize('wrong', [
    dict(head='pairs'), dict(quantization='int4'), dict(dtype='fp16'), dict(pooling='max'), dict(n_classes=4),
    dict(rank=-1), dict(alpha=0), dict(dropout=1), dict(layers=-1)])
def test_settings_that_cannot_work(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))): config('x', **wrong)


def test_odd_sizes_in_4_bit_on_a_cpu_are_refused(tmp_path):
    from transformers import AutoModel
    odd = family_config('llama', hidden_size=96, num_attention_heads=6, num_key_value_heads=6)
    AutoModel.from_config(odd).save_pretrained(tmp_path/'base')
    with pytest.raises(UserError, match='multiples of 64'): load_model(config(tmp_path/'base', quantization='nf4'))
    load_model(config(tmp_path/'base', quantization='int8'))


def test_a_base_stored_in_4_bit(bases, tmp_path):
    from transformers import AutoModel, BitsAndBytesConfig
    nf4 = dict(bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    bits = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    backbone = AutoModel.from_pretrained(bases['llama'], quantization_config=bits, device_map={'': 'cpu'})
    backbone.save_pretrained(tmp_path/'base')
    with pytest.raises(UserError, match='set quantization=nf4'): load_model(config(tmp_path/'base'))
    # our compute dtype, not the stored one
    small, stored = (trained(config(base, quantization='nf4')) for base in (bases['llama'], tmp_path/'base'))
    torch.testing.assert_close(logits_of(stored, make_batch()), logits_of(small, make_batch()), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('family', DECODERS)
def test_gpu_liger_gives_equal_logits(bases, family):
    pytest.importorskip('liger_kernel', reason='liger-kernel is not installed')
    settings = dict(rank=16, dtype='float32')
    plain, fused = (load_model(config(bases[family], liger=liger, **settings), 'cuda:0') for liger in (False, True))
    batch = make_batch().to('cuda:0')
    torch.testing.assert_close(logits_of(plain, batch), logits_of(fused, batch), rtol=1e-3, atol=1e-4)


def test_a_device_that_nobody_has_is_refused(bases):
    with pytest.raises(UserError, match="device='gpu': 'cpu', 'cuda' or"): load_model(config(bases['llama']), 'gpu')


def test_cuda_without_a_device_is_refused(bases, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='no CUDA device'): load_model(config(bases['llama']), 'cuda:0')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
def test_gpu_fp16_step_is_finite(bases, quantization):
    model = load_model(config(bases['gemma2'], quantization=quantization, dtype='float16'), 'cuda:0')
    for layer in blocks(model.backbone): recompute(layer)
    optimizer = torch.optim.AdamW(head_parameters(model) + adapter_parameters(model), 1e-3)
    scaler = torch.amp.GradScaler('cuda')
    batch, labels = make_batch().to('cuda:0'), torch.tensor([0, 1], device='cuda:0')
    losses = []
    for _ in range(5):
        model.train()
        loss = torch.nn.functional.cross_entropy(model(batch), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss))
        assert logits_of(model, batch).isfinite().all()
    assert all(np.isfinite(losses)) and losses[-1] < losses[0]
