"""What is kept for the backward pass and what is computed twice; what gives way when memory runs out.

Equal gradients, the arithmetic of the formula, the cheapest plan, nothing left behind, an embedding on the host."""
import gc
import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import DECODERS, FAMILIES, make_backbone
from hypothesis import given
from hypothesis import strategies as st
from test_model import backward, config, make_batch, trained
from test_packing import both_ways, prompter, rows_of
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from underdog.core import UserError
from underdog.process import _environment
from underdog.model.backbone import host_embedding
from underdog.model.lora import linear_layers
from underdog.model.memory import Kept, blocks, measure_kept, out_of_memory, recompute_only, saved_bytes, workspace
from underdog.model.model import adapter_parameters, head_parameters, load_model
from underdog.model.settings import compute_dtype
from underdog.text.heads import HEADS
from underdog.text.source import RowSource
from underdog.training.budget import MemoryPlan, Needs, batch_costs, choose, plan_memory
from underdog.training.settings import TrainConfig
from underdog.training.step import FitData, Training


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
    recompute_only(again, range(2))
    # dropout too: its random numbers are replayed
    for p, q in zip(gradients(plain, batch), gradients(again, batch)): assert torch.equal(p, q)
    kept = saved_bytes(plain, batch)
    assert saved_bytes(again, batch).sum() < .6*kept.sum()
    # and back
    recompute_only(again, ())
    assert (saved_bytes(again, batch) == kept).all()


@pytest.mark.parametrize('family', ['gemma2', 'deberta'])
def test_a_measurement_leaves_nothing_behind(bases, family, monkeypatch):
    "On a card the passes that were measured lay beside the training until its end: 5 GB for a 9B."
    model = trained(config(bases[family]))
    batch = both_ways(model, 'pair', read='last' if family in DECODERS else 'first')[0]
    weights = {StorageWeakRef(t.untyped_storage()).cdata for t in (*model.parameters(), *model.buffers())}
    kept, hooks = [], torch.autograd.graph.saved_tensors_hooks

    def watched(pack, unpack):
        def note(tensor):
            if tensor.is_floating_point(): kept.append(StorageWeakRef(tensor.untyped_storage()))
            return pack(tensor)
        return hooks(note, unpack)

    monkeypatch.setattr(torch.autograd.graph, 'saved_tensors_hooks', watched)
    saved_bytes(model, batch)
    assert len(kept) > 50
    assert all(storage.expired() or storage.cdata in weights for storage in kept)


@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
def test_recomputation_of_quantized_layers(bases, quantization):
    cfg = config(bases['gemma2'], quantization=quantization, int8_threshold=0.)
    plain, again = trained(cfg), trained(cfg)
    batch = both_ways(plain, 'pair')[0]
    recompute_only(again, [0])
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
    if checkpointing == 'all': recompute_only(model, range(2, 6))
    layers = [model.backbone.get_submodule(name) for name in linear_layers(model.backbone)]
    weights = sum(m.in_features*m.out_features for m in layers if m.in_features > 1 < m.out_features)   # not LoRA's
    with FlopCounterMode(display=False) as counter: model.train()(packed).sum().backward()
    formula = packed.tokens*weights*(2*1/3 + factor*2/3)
    assert .94 < counter.get_total_flops()/formula < 1.06


@pytest.mark.parametrize('checkpointing', ['none', 'all'])
def test_nothing_below_the_first_adapter_has_a_gradient(deep, checkpointing):
    model, outputs = load_model(config(deep, lora_layers='2:')), {}
    batch, _ = both_ways(model, 'pair')
    if checkpointing == 'all': recompute_only(model, range(2, 6))
    layers = list(blocks(model.backbone))
    def note(layer, args, out):
        states = out[0] if isinstance(out, tuple) else out
        outputs[layers.index(layer)] = states.requires_grad
    for layer in layers: layer.register_forward_hook(note)
    model.train()(batch)
    assert outputs == {0: False, 1: False, 2: True, 3: True, 4: True, 5: True}
    assert (saved_bytes(model, batch)[:2] == 0).all()


# ---- what is measured
LONG = {name: list(range(10, 100))*4 for name in ('prompt', 'a', 'b')}


def source_of(head, packing='causal', frame_size=1, rows=None):
    "Rows in a frame whose pieces are `frame_size` times as long."
    long = prompter(head)
    long.frame = {k: v if k == 'read' else v*frame_size for k, v in long.frame.items()}
    long.frame_size *= frame_size
    return RowSource(rows or rows_of(), long, packing)


@pytest.mark.parametrize('orders', ['random', 'both'])
@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('packing', ['causal', ''])
def test_nothing_longer_than_256_tokens_is_measured(bases, monkeypatch, head, packing, orders):
    "Whatever the data: rows of a thousand tokens, a frame of hundreds. Random state and gradients stay as they are."
    if HEADS[head].asks and not packing: pytest.skip('a decoder is packed')
    import datasets
    model, seen = load_model(config(bases['llama'], head=head)), []
    forward = model.forward
    def note(batch):
        seen.append(batch.padded)
        return forward(batch)
    monkeypatch.setattr(model, 'forward', note)
    before = torch.get_rng_state()
    for rows, frame_size in (([LONG]*3, 1), ([LONG]*3, 90), (rows_of(3).to_list(), 1)):
        source = source_of(head, packing, frame_size, datasets.Dataset.from_list(rows))
        plan_memory(model, source, np.arange(3), TrainConfig(orders=orders))
    assert max(seen) <= 256 and len(seen) == 12 and max(seen[:8]) > 200
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('family,dtype', [*itertools.product(FAMILIES, ['float32']), ('llama', 'bfloat16')])
def test_small_batches_tell_what_a_large_one_keeps(bases, family, dtype):
    """A line through 64 and 128 tokens, and for attention that keeps scores their pairs: 1,200 tokens agree.

    In 16 bits autocast's copies of the adapters are as large in every batch."""
    model = load_model(config(bases[family], rank=16, dtype=dtype))
    def batch(n, rows): return make_rows(model, n, rows)
    kept = measure_kept(model, batch(30, 1), batch(30, 2), batch(60, 1))
    large = batch(150, 4)
    expected = kept.fixed.sum() + large.padded*kept.rate(large.padded//4).sum()
    # rather too much than too little: DeBERTa pads spans of like length, short ones by a larger share
    assert .94 < expected/saved_bytes(model, large).sum() < 1.15
    if dtype == 'bfloat16':
        copies = 2*sum(p.numel() for p in adapter_parameters(model))
        assert .85 < kept.fixed.sum()/copies < 1.1   # those below the first gradient are not kept


def make_rows(model, n, rows):
    "`rows` equal rows of `n` tokens a piece, as `model` reads them."
    import datasets
    row = {k: torch.arange(10, 10 + n).remainder(110).add(10).tolist() for k in ('prompt', 'a', 'b')}
    row['b'] = row['b'][::-1]
    source = RowSource(datasets.Dataset.from_list([row]*rows), prompter('pair'), model.packing)
    return source.batch([(i, False) for i in range(rows)])


def test_what_a_step_needs_beside_what_it_keeps(bases):
    "16 bytes a trained parameter, the largest matrix in 16 bits where weights are packed, and an MLP's temporaries."
    plain, packed = (load_model(config(bases['llama'], quantization=q, dtype='bfloat16')) for q in ('none', 'nf4'))
    trained = sum(p.numel() for p in adapter_parameters(plain) + head_parameters(plain))
    assert workspace(plain) == (16*trained, 2*2*128)
    assert workspace(packed) == (16*trained + 2*64*128, 2*2*128)


# ---- what is planned
def plan_of(each, room, entering=1, longest=1, beside=None, fixed=0):
    "A `MemoryPlan` of layers that keep the bytes `each` a token, the last number for everything else."
    each = np.array(each, float)
    kept = Kept(np.full(len(each), float(fixed)), each, 0*each)
    model = SimpleNamespace(cfg=SimpleNamespace(quantization='nf4', tuning='lora'), backbone=None)
    return MemoryPlan(model, 0, Needs(kept, longest, entering, beside), room=room)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12), st.integers(1, 20), st.integers(0, 500))
def test_the_fewest_and_lowest_layers_that_fit(saved, entering, room):
    needs = plan_of(saved, room, entering).needs
    saved = np.array(saved, float)
    def kept(layers): return saved.sum() - saved[layers].sum() + len(layers)*entering
    worth = np.flatnonzero(saved[:-1] > entering)
    assert needs.trained.tolist() == worth.tolist()
    layers = needs.fewest(1, room)
    if layers is None: assert kept(worth) > room
    else: assert kept(worth[:layers]) <= room and (not layers or kept(worth[:layers - 1]) > room)


def walked(saved, layers, entering):
    "The most that is alive while a backward pass goes down, with so many of the lowest layers computed twice."
    *each, outside = saved
    keeps = [entering if i < layers else rate for i, rate in enumerate(each)]
    alive = peak = outside + sum(keeps)
    for i in reversed(range(len(each))):
        if i < layers: peak = max(peak, alive + each[i])   # whole once more, beside what entered it
        alive -= keeps[i]
    return peak


@given(st.integers(2, 12), st.integers(20, 50), st.integers(0, 30), st.data())
def test_a_layer_in_its_second_run_counts_where_nothing_else_is_kept(n, rate, outside, data):
    layers, entering = data.draw(st.integers(0, n)), data.draw(st.integers(1, 19))
    needs = plan_of([rate]*n + [outside], None, entering, beside=7).needs
    assert needs.all(1, layers) == walked([rate]*n + [outside], layers, entering) + 7
    # of layers that differ it is a bound, by less than they differ
    saved = [*data.draw(st.lists(st.integers(20, 50), min_size=n, max_size=n)), outside]
    needs = plan_of(saved, None, entering, beside=7).needs
    assert 0 <= needs.all(1, layers) - 7 - walked(saved, layers, entering) <= n*entering + max(saved)


@given(st.lists(st.integers(20, 50), min_size=2, max_size=12), st.integers(0, 300_000), st.integers(1, 1500),
       st.booleans(), st.sampled_from([None, 0, 40]))
def test_budget_and_layers_are_the_cheapest_that_fit(each, room, longest, packed, beside):
    "Beside every budget with every number of layers: it fits, and no other that fits is over 1 % cheaper."
    plan = plan_of(each, room, longest=longest, beside=beside, fixed=10)
    lengths = np.linspace(1, longest, 20).astype(int)
    costs = batch_costs(lengths, 2048, rows=4, packed=packed, steps=2)
    choose(plan, costs)
    depth, n = len(each) - 1, len(plan.needs.trained)
    def time(budget, layers): return costs[budget]*(1 + (n + layers)/depth)
    fitting = [(b, k) for b in costs for k in range(n + 1) if plan.needs.all(b, k) <= room]
    assert min(costs) >= longest and max(costs) == 2048
    if fitting:
        assert (plan.budget, plan.layers) in fitting
        assert time(plan.budget, plan.layers) <= 1.01*min(time(*option) for option in fitting)
    else: assert (plan.budget, plan.layers) == (min(costs), n)


def test_the_plan_counts_all_and_says_what_it_does(deep):
    model, rows = load_model(config(deep)), np.arange(6)
    source = source_of('pair')
    def plan(free=None, **settings):
        return plan_memory(model, source, rows, TrainConfig(batch_tokens=512, **settings), free)
    everything = plan().needs.keep(512, 0)
    assert 'no layer is computed twice' in str(plan(1e9))
    # as asked for
    for value, layers in (('all', 6), ('none', 0), ('2', 2), ('99', 6)):
        asked = plan(checkpointing=value)
        assert (asked.budget, asked.layers) == (512, layers)
        again = [getattr(layer, 'runs_again', False) for layer in blocks(model.backbone)]
        assert again == [True]*layers + [False]*(6 - layers)
    # room for what is kept alone
    tight = plan(activation_gb=.6*everything/1e9)
    assert tight.needs.keep(tight.budget, tight.layers) <= .6*everything
    # what the device has must hold gradients, moments and temporaries, too
    always, beside = workspace(model)
    free = (everything + 512*beside + always)/.9
    assert (plan(1.01*free).budget, plan(1.01*free).layers) == (512, 0)
    less = plan(.99*free)
    assert (less.budget, less.layers) != (512, 0)
    assert .9*.99*free - always >= less.needs.keep(less.budget, less.layers) + less.budget*beside
    assert 'it may not fit' in str(plan(1000))


# ---- when memory runs out
@given(st.lists(st.integers(20, 50), min_size=2, max_size=12), st.integers(0, 40_000), st.integers(0, 400))
def test_more_layers_give_way_before_the_budget_and_memory_is_used_again(each, limit, fixed):
    """A card that has less than was planned, by any amount: in the end it fits, or there is an error.

    Of every budget all layers are tried before it is halved; then fewer layers are computed twice again."""
    plan = plan_of(each, 1e9, fixed=fixed)
    plan.apply, plan.budget, n = lambda: plan, 1024, plan.trained
    try:
        for _ in range(100):
            if plan.needs.all(plan.budget, plan.layers) <= limit: break
            before = plan.budget, plan.layers
            plan.less()
            if before[1] < n: assert plan.budget == before[0] and plan.layers >= (before[1] + n)/2
            else:
                assert plan.budget == before[0]//2 and plan.room < plan.needs.all(*before)
                fewest = plan.needs.fewest(plan.budget, plan.room)
                assert plan.layers == (n if fewest is None else fewest)
        else: pytest.fail('no end')
    except UserError: assert plan.needs.all(127, n) > limit or plan.budget < 128


def small_card(model, fits):
    "Let `model` run out of memory in its last layer unless `fits(tokens, layers computed twice)`; tokens of each try."
    tries, forward, last = [], model.forward, blocks(model.backbone)[-1]
    def note(batch):
        tries.append(batch.tokens)
        return forward(batch)
    def look(layer, *_):
        again = sum(getattr(block, 'runs_again', False) for block in blocks(model.backbone))
        if not fits(tries[-1], again): raise torch.OutOfMemoryError('as a GPU would')
    model.forward = note
    last.mlp.register_forward_pre_hook(look)
    return tries


def training_of(model, fits=None, **settings):
    "A `Training` on six rows, on a card where that `fits`."
    from accelerate import Accelerator
    data = FitData(source_of('pair'), np.eye(3)[[0, 1, 2, 0, 1, 2]], None, np.arange(6))
    cfg = TrainConfig(**dict(batch_rows=6, batch_tokens=512, lr=1e-2, n_folds=2) | settings)
    memory = plan_memory(model, data.source, data.train, cfg, free=1e9)
    tries = small_card(model, fits) if fits else []
    return Training(model, data, cfg, Accelerator(cpu=True), memory), tries


def test_a_step_recomputes_more_before_it_computes_less(deep, capsys):
    "The same gradients, whatever gives way; a resumed run plans for the budget that it finds."
    models = [trained(config(deep)) for _ in range(3)]
    plain, more, smaller = (
        training_of(models[0], batch_tokens=128)[0],
        training_of(models[1], lambda tokens, layers: layers >= 4, batch_tokens=128)[0],
        training_of(models[2], lambda tokens, layers: tokens <= 70, batch_tokens=128)[0])
    for training in (plain, more, smaller):
        torch.manual_seed(0)
        training._backward_in_memory([(row, False) for row in range(6)], 1/6)
    said = capsys.readouterr().out
    assert 'with 128 tokens in a forward pass: 3 of 6 trained layers are computed twice' in said
    assert (more.at.budget, more.memory.layers) == (128, 5)
    # not even all six would do: tokens had to give way
    assert smaller.at.budget == 64 and smaller.memory.layers < 6
    for training in (more, smaller):
        for p, q in zip(plain.params, training.params): torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)
    again = training_of(models[0], batch_tokens=128)[0]
    again.memory.room = again.memory.needs.all(128, 4)
    again.memory.fit(128)
    assert again.memory.layers == 4
    again.load(smaller.state())
    assert again.at.budget == again.memory.budget == 64 and again.memory.layers < 4


@pytest.mark.parametrize('layers', ['none', 'all'])
def test_nothing_of_a_pass_that_ran_out_of_memory_is_left(deep, monkeypatch, layers):
    "Not even in the reference cycles of layers that are computed twice. The collector does not run by itself here."
    import underdog.training.step as step
    model, states, alive = trained(config(deep)), [], []
    training, tries = training_of(model, lambda tokens, layers: len(tries) > 1, checkpointing=layers)
    # what enters each module, in the first try as far as it came; in a cycle, as some versions of torch leave it
    def note(module, args):
        if len(tries) > 1: return
        states.extend(weakref.ref(x) for x in args)
        cycle = [args]
        cycle.append(cycle)
    for module in model.backbone.modules(): module.register_forward_pre_hook(note)
    def released():
        assert len(states) > 50
        before()
        alive.append(sum(ref() is not None for ref in states))
    before = step.release_memory
    monkeypatch.setattr(step, 'release_memory', released)
    gc.collect()
    gc.disable()
    try: training._backward_in_memory([(row, False) for row in range(6)], 1/6)
    finally: gc.enable()
    assert alive == [0] and len(tries) > 1


def test_what_counts_as_memory_that_ran_out(bases):
    "cuBLAS says it in words; every other error ends the step."
    cublas = RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')
    assert out_of_memory(cublas) and out_of_memory(torch.OutOfMemoryError())
    assert not out_of_memory(RuntimeError('CUDA error: device-side assert triggered'))
    assert not out_of_memory(ValueError('CUBLAS_STATUS_ALLOC_FAILED'))
    training, _ = training_of(trained(config(bases['llama'])))
    forward, errors = training.model.forward, [cublas, RuntimeError('something else')]
    def fail(batch):
        if errors: raise errors.pop(0)
        return forward(batch)
    training.model.forward = fail
    with pytest.raises(RuntimeError, match='something else'): training._backward_in_memory([(0, False)], 1.)
    assert training.memory.layers == 1


def test_the_last_remedies_are_not_those_that_were_tried(bases):
    "No one is told to set what is set already."
    def message(**settings):
        model = load_model(config(bases['llama'], quantization=settings.pop('quantization', 'none')))
        training, _ = training_of(model, lambda tokens, layers: False, batch_tokens=64, **settings)
        with pytest.raises(UserError) as error: training._backward_in_memory([(0, False)], 1.)
        return str(error.value)
    assert 'checkpointing' not in message() and 'set quantization=nf4' in message()
    assert 'set checkpointing=all' in message(checkpointing='none')
    for words in ('checkpointing', 'quantization'): assert words not in message(quantization='nf4', checkpointing='all')
    assert 'max_length' in message(quantization='nf4')


def test_a_child_process_has_segments_that_grow(monkeypatch):
    "Unless a person has set the allocator, by its old name or its new one."
    names = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')
    for name in names: monkeypatch.delenv(name, raising=False)
    assert [_environment(1)[name] for name in names] == ['expandable_segments:True']*2
    for name in names:
        with monkeypatch.context() as m:
            m.setenv(name, 'max_split_size_mb:64')
            assert {k: v for k, v in _environment(1).items() if k in names} == {name: 'max_split_size_mb:64'}


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
