"""Packed equals padded: logits and gradients, every family, layouts, windows, grouped queries, dtypes.

The symmetric layouts; the last layer; bins, shares and memory."""
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from fixtures import DECODERS, FAMILIES, family_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import trained

from underdog.core import UserError
from underdog.machine import quiet
from underdog.model.head import exchange
from underdog.model.model import adapter_parameters, load_model
from underdog.model.settings import ModelConfig
from underdog.model.predict import predict_both
from underdog.text.bins import pack_bins, pack_windows, rank_share
from underdog.text.heads import HEADS
from underdog.text.layout import row_layout, sequences
from underdog.text.pack import pack, read_plan
from underdog.text.source import RowSource, present

PAIR = dict(start=[1], middle=[2], end=[3])
JOINT = dict(start=[1], label_a=[4], label_b=[5, 6], end=[3])
FRAMES = dict(pair=PAIR, joint=JOINT, symmetric=PAIR | dict(ask=[8, 9]), combined=PAIR | dict(ask=[8, 9]))
ids = st.lists(st.integers(10, 99), max_size=12)
segments = st.fixed_dictionaries(dict(prompt=ids, a=ids, b=ids))


def prompter(head, read='last'):
    "The part of a `Prompter` that a source needs."
    frame = FRAMES[head]
    size = sum(map(len, frame.values()))
    return SimpleNamespace(head=HEADS[head], frame=frame | dict(read=read), frame_size=size, read=read, pad_id=0)


def rows_of(n=6, seed=0, longest=14):
    "Rows with ids below 128; one has an empty answer, one has equal answers, one has an empty prompt."
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        lengths = dict(zip(('prompt', 'a', 'b'), rng.integers(1, longest, 3)))
        rows.append({name: rng.integers(10, 128, length).tolist() for name, length in lengths.items()})
    rows[0]['b'] = []
    rows[1]['b'] = rows[1]['a']
    rows[2]['prompt'] = []
    return datasets.Dataset.from_list(rows)


def mirrored(rows):
    "`rows` with A and B exchanged."
    return datasets.Dataset.from_list([dict(prompt=r['prompt'], a=r['b'], b=r['a']) for r in rows])


def as_given(n=6): return [(row, False) for row in range(n)]


def both_ways(model, head, orders=(False,), read='last', longest=14):
    "(packed, padded) batches of the same presentations."
    shown = [(row, swapped) for row in range(6) for swapped in orders]
    rows = rows_of(longest=longest)
    return [RowSource(rows, prompter(head, read), packing).batch(shown) for packing in (model.packing, '')]


def logits_and_gradients(model, batch):
    "Logits and adapter gradients in evaluation mode (BERT and DeBERTa have dropout)."
    model.eval().zero_grad()
    logits = model(batch)
    weights = torch.arange(1, logits.numel() + 1, device=logits.device).view_as(logits)
    (logits*weights).sum().backward()
    return logits.detach(), [p.grad.clone() for p in adapter_parameters(model)]


def equal_both_ways(model, packed, padded, rtol=1e-4, atol=5e-5):
    logits, gradients = logits_and_gradients(model, packed)
    reference, reference_gradients = logits_and_gradients(model, padded)
    torch.testing.assert_close(logits, reference, rtol=rtol, atol=atol)
    for a, b in zip(gradients, reference_gradients):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol*max(1, float(b.abs().max())))


# ---- packed equals padded

@pytest.mark.parametrize('head', ['pair', 'joint'])
@pytest.mark.parametrize('family', FAMILIES)
def test_packed_equals_padded(bases, family, head):
    encoder = family not in DECODERS
    model = trained(ModelConfig(str(bases[family]), head=head, rank=4, quantization='none'))
    assert model.packing == ('bidirectional' if encoder else 'causal')
    packed, padded = both_ways(model, head, HEADS[head].orders, 'first' if encoder else 'last')
    assert packed.rows.tolist() == padded.rows.tolist() and packed.swapped.tolist() == padded.swapped.tolist()
    assert packed.tokens == packed.padded < padded.padded
    assert encoder or packed.tokens < padded.tokens
    equal_both_ways(model, packed, padded)


@pytest.mark.parametrize('pooling', ['mean', 'read', 'first', 'last'])
@pytest.mark.parametrize('family', ['llama', 'deberta'])
def test_packed_equals_padded_for_every_pooling(bases, family, pooling):
    model = trained(ModelConfig(str(bases[family]), rank=4, pooling=pooling, quantization='none'))
    equal_both_ways(model, *both_ways(model, 'pair'))


@pytest.fixture(scope='module')
def odd_bases(tmp_path_factory):
    "Backbones with grouped queries, and with sliding windows of 6 tokens, shorter than a row."
    from transformers import AutoModel
    quiet()
    root = tmp_path_factory.mktemp('odd')
    grouped, window = dict(num_key_value_heads=2), dict(sliding_window=6)
    one_of_two = dict(use_sliding_window=True, layer_types=['full_attention', 'sliding_attention'])
    scaled = dict(rope_type='llama3', rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4.,
                  original_max_position_embeddings=16)
    odd = {
        'llama_grouped': ('llama', grouped),
        'mistral_window': ('mistral', grouped | window),
        'gemma2_window': ('gemma2', grouped | window),
        'qwen2_window': ('qwen2', window | one_of_two),
        'llama3_rope': ('llama', dict(rope_parameters=scaled)),
    }
    for name, (family, extra) in odd.items():
        torch.manual_seed(0)
        AutoModel.from_config(family_config(family, **extra)).save_pretrained(root/name)
    return {name: root/name for name in odd}


@pytest.mark.parametrize('name', ['llama_grouped', 'mistral_window', 'gemma2_window', 'qwen2_window', 'llama3_rope'])
def test_grouped_queries_windows_and_scaled_positions(odd_bases, name):
    for head in ('pair', 'joint'):
        model = trained(ModelConfig(str(odd_bases[name]), head=head, rank=4, quantization='none'))
        equal_both_ways(model, *both_ways(model, head, HEADS[head].orders, longest=30))


@pytest.mark.parametrize('name', ['mistral_window', 'gemma2_window', 'qwen2_window'])
def test_the_window_matters(odd_bases, bases, name):
    "A window of 6 tokens changes the result: the test above does not pass because it is ignored on both sides."
    cfg = ModelConfig(str(odd_bases[name]), rank=4, quantization='none')
    model = trained(cfg)
    packed, _ = both_ways(model, 'pair', longest=30)
    with torch.no_grad():
        narrow = model(packed)
        for module in model.backbone.modules():
            if getattr(module, 'sliding_window', None): module.sliding_window = None
        if 'mistral' in name: model.backbone.config.sliding_window = None   # the others keep it in their layers
        packed.plan.cache.clear()
        assert (model(packed) - narrow).abs().max() > 1e-4


@pytest.mark.parametrize('dtype, tolerance', [('bfloat16', 6e-2), ('float16', 1e-2)])
@pytest.mark.parametrize('family', ['llama', 'gemma2', 'bert'])
def test_half_precision(bases, family, dtype, tolerance):
    model = trained(ModelConfig(str(bases[family]), rank=4, dtype=dtype, quantization='none'))
    packed, padded = both_ways(model, 'pair')
    with torch.no_grad(): torch.testing.assert_close(model(packed), model(padded), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('quantization', ['nf4', 'int8'])
def test_quantized(bases, quantization):
    model = trained(ModelConfig(str(bases['llama']), rank=4, quantization=quantization, int8_threshold=0.))
    equal_both_ways(model, *both_ways(model, 'pair'), rtol=1e-3, atol=1e-3)


def test_packing_does_not_change_a_row(bases):
    "A row's logits do not depend on what lies beside it."
    model = trained(ModelConfig(str(bases['qwen2']), rank=4, quantization='none'))
    source = RowSource(rows_of(), prompter('pair'), 'causal')
    with torch.no_grad():
        together = model(source.batch(as_given()))
        alone = torch.cat([model(source.batch([presentation])) for presentation in as_given()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# ---- symmetric and combined

def logits_of_both(model, head, rows):
    "Logits of `rows` as they are given, and with A and B exchanged."
    with torch.no_grad():
        return [model(RowSource(x, prompter(head), 'causal').batch(as_given())) for x in (rows, mirrored(rows))]


@pytest.mark.parametrize('head', ['symmetric', 'combined'])
@pytest.mark.parametrize('family', DECODERS)
def test_symmetric_heads_cannot_have_an_order_bias(bases, family, head):
    model = trained(ModelConfig(str(bases[family]), head=head, rank=4, quantization='none'))
    logits, exchanged = logits_of_both(model, head, rows_of())
    torch.testing.assert_close(exchange(exchanged), logits, rtol=1e-4, atol=1e-5)
    assert (exchanged - logits)[2:].abs().max() > 1e-3   # and A and B are told apart
    torch.testing.assert_close(logits[1, 0], logits[1, 1], rtol=1e-4, atol=1e-5)   # equal answers: equal chances


@pytest.mark.parametrize('name', ['mistral_window', 'llama3_rope'])
def test_symmetric_with_windows_and_scaled_positions(odd_bases, name):
    model = trained(ModelConfig(str(odd_bases[name]), head='symmetric', rank=4, quantization='none'))
    logits, exchanged = logits_of_both(model, 'symmetric', rows_of(longest=30))
    torch.testing.assert_close(exchange(exchanged), logits, rtol=1e-4, atol=1e-5)


def test_a_read_out_sees_the_second_answer_as_if_it_followed_the_first(bases):
    """With one layer, keys do not depend on what their token saw.

    So the first read-out's state is that of the plain text prompt, A, B, ask."""
    from underdog.model.backbone import load_backbone
    cfg = ModelConfig(str(bases['llama']), head='symmetric', layers=1, rank=4, quantization='none')
    row, model = rows_of()[4], load_model(cfg)
    text = torch.tensor([[1, *row['prompt'], 2, *row['a'], 3, *row['b'], 3, 8, 9]])
    with torch.no_grad():
        states = model.features(pack([row_layout(FRAMES['symmetric'], row, 'symmetric')], [0], [False]))
        plain = load_backbone(cfg)(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state
    torch.testing.assert_close(states[0], plain[0, -1], rtol=1e-4, atol=1e-5)


def test_combined_starts_as_pair(bases):
    def logits(head):
        model = load_model(ModelConfig(str(bases['llama']), head=head, rank=4, quantization='none'))
        with torch.no_grad(): return model(RowSource(rows_of(), prompter(head), 'causal').batch(as_given()))
    torch.testing.assert_close(logits('pair'), logits('combined'), rtol=1e-4, atol=1e-6)


def test_symmetric_wants_a_decoder(bases):
    cfg = ModelConfig(str(bases['bert']), head='symmetric', quantization='none')
    with pytest.raises(UserError, match="use head='pair'"): load_model(cfg)


# ---- plans

@settings(deadline=None)
@given(rows=st.lists(segments, min_size=1, max_size=4), head=st.sampled_from(list(FRAMES)), data=st.data())
def test_layouts_hold_the_sequences(rows, head, data):
    "What an output can see, in the order of positions, is exactly its sequence; every token lies in one span."
    orders = data.draw(st.sampled_from([(False,), (True,), (False, True)])) if head == 'joint' else (False,)
    layouts = [row_layout(FRAMES[head], r, head, orders, 'last') for r in rows]
    shown = [(i, swapped) for i in range(len(rows)) for swapped in orders]
    batch = pack(layouts, *zip(*shown), [len(orders)]*len(rows))
    assert sorted(t for s in batch.plan.spans for t in range(s.start, s.end)) == list(range(batch.tokens))
    # what the last token of each result can see: every position once
    views = [seen_by(last, batch) for last in batch.last.tolist()]
    for view in views: assert [position for position, _ in view] == list(range(len(view)))
    if HEADS[head].asks: return
    # it is the sequence, and what is averaged is its pool
    seqs = [sequences(FRAMES[head], rows[i], head, swapped, 'last') for i, swapped in shown]
    expected = [s for nth in zip(*seqs) for s in nth]
    text = batch.input_ids[0]
    for j, (view, s) in enumerate(zip(views, expected, strict=True)):
        assert [token for _, token in view] == s.ids
        assert sorted(text[batch.pool[batch.pool_of == j]].tolist()) == sorted(s.ids[slice(*s.pool)])


def seen_by(token, batch):
    "Sorted (position, id) of everything that a `token` of a packed batch attends to, itself included."
    text, positions = batch.input_ids[0].tolist(), batch.plan.positions.tolist()
    span = next(s for s in batch.plan.spans if s.start <= token < s.end)
    earlier = [(positions[t] + keys.moved, text[t]) for keys in span.sees for t in range(keys.start, keys.end)]
    return sorted(earlier + [(positions[t], text[t]) for t in range(span.start, token + 1)])


def test_the_last_layer_is_computed_only_where_it_is_read(bases):
    from torch.utils.flop_counter import FlopCounterMode
    model = load_model(ModelConfig(str(bases['llama']), rank=4, pooling='read', quantization='none'))
    batch = RowSource(rows_of(longest=40), prompter('pair'), 'causal').batch(as_given())

    def count():
        with torch.no_grad(), FlopCounterMode(display=False) as counter: result = model(batch)
        return result, counter.get_total_flops()
    short, few = count()
    # the same with the layer as transformers made it
    layer = model.backbone.get_base_model().layers[-1]
    whole = layer.forward.args[1]
    layer.forward = lambda *args, plan=None, **kwargs: whole(*args, plan=plan, **kwargs)
    model.planner.reads = False
    full, many = count()
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)
    assert few < .75*many


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 800))
def test_bins_hold_every_row_once_within_the_budget(lengths, budget):
    for bins in (pack_bins(lengths, budget), pack_windows(lengths, budget, window=16)):
        assert sorted(int(r) for rows in bins for r in rows) == list(range(len(lengths)))
        for rows in bins:
            assert len(rows)
            assert len(rows) == 1 or sum(lengths[r] for r in rows) <= budget
    # two bins at most half full would have been one
    bins = pack_bins(lengths, budget)
    if lengths and max(lengths) <= budget: assert len(bins) <= max(1, 2*sum(lengths)/budget)
    # the fullest first
    filled = [sum(lengths[r] for r in rows) for rows in bins]
    assert filled == sorted(filled, reverse=True)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), world=st.integers(1, 4))
def test_shares_are_whole_and_even(lengths, world):
    shares = [rank_share(range(len(lengths)), lengths, r, world) for r in range(world)]
    assert sorted(sum(shares, [])) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in s) for s in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_reading_a_plan_twice_changes_nothing():
    batch = pack([row_layout(PAIR, r, 'pair') for r in rows_of()], range(6), [False]*6)
    once = read_plan(batch.plan, batch.pool.numpy())
    kept = once.kept.tolist()
    assert set(batch.pool.tolist()) <= set(kept) and kept == sorted(set(kept))
    twice = read_plan(once, once.kept.numpy())
    assert [(s.start, s.end) for s in twice.spans] == [(s.start, s.end) for s in once.spans]


def test_mistakes():
    one, two = row_layout(JOINT, rows_of()[3], 'joint'), row_layout(PAIR, rows_of()[3], 'pair')
    with pytest.raises(UserError, match='token budget'): pack_bins([3], 0)
    with pytest.raises(ValueError, match='at least one row'): pack([], [], [])
    with pytest.raises(ValueError, match='same number of results'): pack([one, two], [0, 1], [False]*2)


# ---- sources and predictions

@pytest.mark.parametrize('head', list(FRAMES))
@pytest.mark.parametrize('orders', [(False,), (False, True)])
def test_micro_batches_hold_every_presentation_once(head, orders):
    shown = present(list(range(6)), 'both' if len(orders) == 2 else 'given', head, np.random.default_rng(0))
    for packing in ['causal'] if HEADS[head].asks else ['causal', 'bidirectional', '']:
        source = RowSource(rows_of(longest=30), prompter(head), packing)
        batches = source.micro_batches(shown, 90)
        assert len(batches) > 1
        assert sorted((int(r), bool(s)) for b in batches for r, s in zip(b.rows, b.swapped)) == sorted(shown)
        for b in batches: assert b.padded <= 90 or len(set(b.rows.tolist())) == 1


@pytest.mark.parametrize('packing', ['causal', ''])
def test_both_orders_at_once_are_the_two_orders(bases, packing):
    model, rows = trained(ModelConfig(str(bases['llama']), head='joint', rank=4, quantization='none')), np.arange(6)
    source, mirror = (RowSource(x, prompter('joint'), packing) for x in (rows_of(), mirrored(rows_of())))
    both = predict_both(model, source, rows, budget=64)
    one = predict_both(model, source, rows, tta=False, budget=64)
    np.testing.assert_allclose(both['one'], one['one'], rtol=1e-4, atol=1e-6)
    # the law of TTA: exchanged answers, exchanged probabilities
    exchanged = predict_both(model, mirror, rows, budget=64)
    np.testing.assert_allclose(exchanged['both'][:, [1, 0, 2]], both['both'], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('packing', ['causal', ''])
@pytest.mark.parametrize('head', ['pair', 'joint'])
def test_results_come_back_in_the_order_of_the_rows(bases, head, packing):
    "Whatever rows met in a forward pass."
    model = trained(ModelConfig(str(bases['llama']), head=head, rank=4, quantization='none'))
    source, rows = RowSource(rows_of(), prompter(head), packing), np.array([4, 0, 5, 2, 1, 3])
    batches = source.bins(rows, 64, HEADS[head].orders)
    assert len(batches) > 1 and np.concatenate(batches).tolist() != rows.tolist()
    logits = predict_both(model, source, rows, budget=64)['logits']
    alone = [predict_both(model, source, [row])['logits'][0] for row in rows]
    np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_is_a_smaller_batch_not_another_result(bases, monkeypatch, capsys):
    from accelerate import Accelerator

    from underdog.training.loop import fit
    from underdog.training.settings import TrainConfig
    from underdog.training.step import FitData, Training
    y = np.eye(3)[[0, 1, 2, 0, 1, 2]]

    def run(limit):
        "The adapter after three epochs on a card with memory for so many tokens."
        torch.manual_seed(0)
        model = load_model(ModelConfig(str(bases['llama']), rank=4, quantization='none'))
        forward = model.forward

        def small_card(batch):
            if batch.tokens > limit: raise torch.OutOfMemoryError('as a GPU would')
            return forward(batch)
        monkeypatch.setattr(model, 'forward', small_card)
        cfg = TrainConfig(batch_rows=6, batch_tokens=1024, epochs=3., lr=1e-2, n_folds=2)
        data = FitData(RowSource(rows_of(), prompter('pair'), 'causal'), y, None, np.arange(6))
        fit(Training(model, data, cfg, Accelerator(cpu=True)))
        return [p.detach().clone() for p in adapter_parameters(model)]
    free, tight = run(10**6), run(70)
    assert 'out of memory with 128 tokens in a forward pass: 64 from now on' in capsys.readouterr().out
    for a, b in zip(free, tight): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match='checkpointing=all'): run(0)


@pytest.mark.parametrize('orders', ['random', 'both', 'given'])
@pytest.mark.parametrize('head', [h for h in HEADS if len(HEADS[h].orders) == 1])
def test_a_symmetric_head_is_trained_on_rows_as_given(bases, head, orders):
    """Its layout has no order, so nothing may be exchanged on the way out.

    With `orders` random the labels of half the rows were."""
    model = trained(ModelConfig(str(bases['llama']), head=head, rank=4, quantization='none'))
    source = RowSource(rows_of(), prompter(head), 'causal')
    shown = present(list(range(6)), orders, head, np.random.default_rng(0))
    with torch.no_grad(): torch.testing.assert_close(model(source.batch(shown)), model(source.batch(as_given())))
