"""What is kept for the backward pass and what is computed twice.

Equal gradients, the arithmetic of the formula, the fewest layers, an embedding on the host."""
import numpy as np
import pytest
import torch
from fixtures import DECODERS, FAMILIES, make_backbone
from hypothesis import given
from hypothesis import strategies as st
from test_model import backward, config, make_batch, trained
from test_packing import both_ways
from torch.utils.flop_counter import FlopCounterMode

from underdog.core import UserError
from underdog.model.backbone import host_embedding
from underdog.model.lora import linear_layers
from underdog.model.memory import blocks, layers_to_recompute, plan_memory, saved_bytes
from underdog.model.model import adapter_parameters, head_parameters, load_model
from underdog.model.settings import compute_dtype
from underdog.training.settings import TrainConfig


def gradients(model, batch):
    backward(model, batch)
    return [p.grad for p in adapter_parameters(model) + head_parameters(model)]


@pytest.mark.parametrize('how', ['packed', 'padded'])
@pytest.mark.parametrize('family', FAMILIES)
def test_recomputation_changes_no_gradient_and_keeps_less(bases, family, how):
    plain, again = trained(config(bases[family])), trained(config(bases[family]))
    read = 'last' if family in DECODERS else 'first'
    packed, padded = both_ways(plain, 'pair', read=read)
    batch = packed if how == 'packed' else padded
    line = plan_memory(again, batch, batch.padded, 'all')
    assert '2 of 2 trained layers are computed twice' in line
    # dropout too: its random numbers are replayed
    for p, q in zip(gradients(plain, batch), gradients(again, batch)): assert torch.equal(p, q)
    assert saved_bytes(again, batch).sum() < .6*saved_bytes(plain, batch).sum()


@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
def test_recomputation_of_quantized_layers(bases, quantization):
    cfg = config(bases['gemma2'], quantization=quantization, int8_threshold=0.)
    plain, again = trained(cfg), trained(cfg)
    batch = both_ways(plain, 'pair')[0]
    plan_memory(again, batch, batch.tokens, '1')
    for p, q in zip(gradients(plain, batch), gradients(again, batch)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope='module')
def deep(tmp_path_factory):
    "A Llama of six layers."
    return make_backbone(tmp_path_factory.mktemp('deep'), num_hidden_layers=6)


@pytest.mark.parametrize('checkpointing,factor', [('none', 4), ('all', 6)])
def test_a_frozen_third_costs_its_forward_pass_alone(deep, checkpointing, factor):
    """2P·f + (4 or 6)P·(1 − f) for each token, by FLOP counter.

    LoRA (rank 1) and the attention of these short rows are the rest."""
    model = load_model(config(deep, rank=1, lora_layers='2:', pooling='mean'))
    packed, _ = both_ways(model, 'pair', longest=4)
    # the last layer is read at every token
    packed.pool = torch.arange(packed.tokens)
    packed.pool_of = packed.pool % len(packed.read)
    plan_memory(model, packed, packed.tokens, checkpointing)
    layers = [model.backbone.get_submodule(name) for name in linear_layers(model.backbone)]
    weights = sum(m.in_features*m.out_features for m in layers if m.in_features > 1 < m.out_features)   # not LoRA's
    with FlopCounterMode(display=False) as counter: model.train()(packed).sum().backward()
    formula = packed.tokens*weights*(2*1/3 + factor*2/3)
    assert .94 < counter.get_total_flops()/formula < 1.06


@pytest.mark.parametrize('checkpointing', ['none', 'all'])
def test_nothing_below_the_first_adapter_has_a_gradient(deep, checkpointing):
    model, outputs = load_model(config(deep, lora_layers='2:')), {}
    batch, _ = both_ways(model, 'pair')
    plan_memory(model, batch, batch.tokens, checkpointing)
    layers = list(blocks(model.backbone))
    def note(layer, args, out):
        states = out[0] if isinstance(out, tuple) else out
        outputs[layers.index(layer)] = states.requires_grad
    for layer in layers: layer.register_forward_hook(note)
    model.train()(batch)
    assert outputs == {0: False, 1: False, 2: True, 3: True, 4: True, 5: True}
    assert (saved_bytes(model, batch)[:2] == 0).all()


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12), st.integers(1, 20), st.integers(0, 500))
def test_the_fewest_and_lowest_layers_that_fit(saved, entering, room):
    saved = np.array(saved, float)
    chosen = layers_to_recompute(saved, entering, room)
    def kept(layers): return saved.sum() - saved[layers].sum() + len(layers)*entering
    worth = np.flatnonzero(saved[:-1] > entering)
    assert chosen.tolist() == worth[:len(chosen)].tolist()
    assert kept(chosen) <= room or len(chosen) == len(worth)
    if len(chosen): assert kept(chosen[:-1]) > room


def test_the_plan_says_what_it_does(deep):
    model = load_model(config(deep))
    batch, _ = both_ways(model, 'pair')
    before = torch.get_rng_state()
    everything = saved_bytes(model, batch).sum()
    assert 'no layer is computed twice' in plan_memory(model, batch, batch.tokens, 'auto', 2*everything)
    line = plan_memory(model, batch, batch.tokens, 'auto', .6*everything)
    assert '3 of 6 trained layers' in line and saved_bytes(model, batch).sum() <= .6*everything
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('value', ['some', '', '-1', '1.5'])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match='a number of layers wanted'): TrainConfig(checkpointing=value)


def test_an_embedding_on_the_host_gives_equal_states(bases):
    here, there = (trained(config(bases['gemma2'])) for _ in range(2))
    batch, _ = both_ways(here, 'pair')
    host_embedding(there.backbone.get_input_embeddings())
    for p, q in zip(gradients(here, batch), gradients(there, batch)): assert torch.equal(p, q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_gpu_embedding_waits_on_the_host(bases, monkeypatch):
    monkeypatch.setattr('underdog.model.backbone._HOST_SHARE', 0)
    model = load_model(config(bases['gemma2']), 'cuda:0')
    assert not model.backbone.get_input_embeddings().weight.is_cuda
    assert model(make_batch().to('cuda:0')).isfinite().all()


def test_bf16_without_units_for_it_is_refused(monkeypatch):
    "On a T4 (compute capability 7.5); from 8.0 it is what 'auto' takes."
    def dtype_of(dtype): return compute_dtype(config('x', dtype=dtype), 'cuda:0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (7, 5))
    with pytest.raises(UserError, match='7.5.*set dtype=float16'): dtype_of('bfloat16')
    assert dtype_of('auto') == dtype_of('float16') == torch.float16
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (8, 0))
    assert dtype_of('bfloat16') == dtype_of('auto') == torch.bfloat16
