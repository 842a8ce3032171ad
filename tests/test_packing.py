"Packed equals padded: logits and gradients, every family, layouts, windows, grouped queries, dtypes; the symmetric layouts; the last layer; shares and memory."
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from fixtures import DECODERS, FAMILIES, family_config
from test_model import trained

from underdog.core import UserError
from underdog.machine import quiet
from underdog.model.head import exchange
from underdog.text.heads import HEADS
from underdog.text.layout import row_layout, sequences
from underdog.model.model import ModelConfig, adapter_parameters, load_model
from underdog.text.pack import pack, pack_bins, pack_windows, read_plan
from underdog.text.source import RowSource, present, rank_share
from underdog.model.predict import predict_both

PAIR, JOINT = dict(start=[1], middle=[2], end=[3]), dict(start=[1], label_a=[4], label_b=[5, 6], end=[3])
FRAMES = dict(pair=PAIR, joint=JOINT, symmetric=PAIR | dict(ask=[8, 9]), combined=PAIR | dict(ask=[8, 9]))
ids = st.lists(st.integers(10, 99), max_size=12)
segments = st.fixed_dictionaries(dict(prompt=ids, a=ids, b=ids))


def prompter(head, read='last'):
    frame = FRAMES[head] | dict(read=read)
    return SimpleNamespace(head=HEADS[head], frame=frame, frame_size=sum(len(x) for n, x in frame.items() if n != 'read'), read=read, pad_id=0)


def rows_of(n=6, seed=0, longest=14):
    "Rows with ids below 128; one has an empty answer, one has equal answers, one has an empty prompt."
    rng = np.random.default_rng(seed)
    rows = [{c: rng.integers(10, 128, k).tolist() for c, k in zip(('prompt', 'a', 'b'), rng.integers(1, longest, 3))} for _ in range(n)]
    rows[0]['b'], rows[1]['b'], rows[2]['prompt'] = [], rows[1]['a'], []
    return datasets.Dataset.from_list(rows)


def both_ways(model, head, orders=(False,), read='last', longest=14):
    "(packed, padded) batches of the same presentations."
    shown = [(r, o) for r in range(6) for o in orders]
    return [RowSource(rows_of(longest=longest), prompter(head, read), how).batch(shown) for how in (model.packing, '')]


def logits_and_gradients(model, batch):
    "Logits and adapter gradients in evaluation mode (BERT and DeBERTa have dropout)."
    model.eval().zero_grad()
    logits = model(batch)
    (logits*torch.arange(1, logits.numel() + 1).view_as(logits)).sum().backward()
    return logits.detach(), [p.grad.clone() for p in adapter_parameters(model)]


def equal_both_ways(model, packed, padded, rtol=1e-4, atol=5e-5):
    (l1, g1), (l2, g2) = logits_and_gradients(model, packed), logits_and_gradients(model, padded)
    torch.testing.assert_close(l1, l2, rtol=rtol, atol=atol)
    for a, b in zip(g1, g2): torch.testing.assert_close(a, b, rtol=rtol, atol=atol*max(1, float(b.abs().max())))


# ---- packed equals padded

@pytest.mark.parametrize('head', ['pair', 'joint'])
@pytest.mark.parametrize('family', FAMILIES)
def test_packed_equals_padded(bases, family, head):
    model, encoder = trained(ModelConfig(str(bases[family]), head=head, rank=4, quantization='none')), family not in DECODERS
    assert model.packing == ('bidirectional' if encoder else 'causal')
    packed, padded = both_ways(model, head, (False, True) if head == 'joint' else (False,), 'first' if encoder else 'last')
    assert packed.rows.tolist() == padded.rows.tolist() and packed.swapped.tolist() == padded.swapped.tolist()
    assert packed.tokens < padded.padded and packed.tokens == packed.padded and (encoder or packed.tokens < padded.tokens)
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
    grouped = dict(num_key_value_heads=2)
    odd = dict(llama_grouped=('llama', grouped), mistral_window=('mistral', grouped | dict(sliding_window=6)), gemma2_window=('gemma2', dict(sliding_window=6, num_key_value_heads=2)),
               qwen2_window=('qwen2', dict(sliding_window=6, use_sliding_window=True, layer_types=['full_attention', 'sliding_attention'])),
               llama3_rope=('llama', dict(rope_parameters=dict(rope_type='llama3', rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16))))
    for name, (family, extra) in odd.items():
        torch.manual_seed(0)
        AutoModel.from_config(family_config(family, **extra)).save_pretrained(root/name)
    return {name: root/name for name in odd}


@pytest.mark.parametrize('name', ['llama_grouped', 'mistral_window', 'gemma2_window', 'qwen2_window', 'llama3_rope'])
def test_grouped_queries_windows_and_scaled_positions(odd_bases, name):
    for head, orders in (('pair', (False,)), ('joint', (False, True))):
        model = trained(ModelConfig(str(odd_bases[name]), head=head, rank=4, quantization='none'))
        equal_both_ways(model, *both_ways(model, head, orders, longest=30))


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
    model, source = trained(ModelConfig(str(bases['qwen2']), rank=4, quantization='none')), RowSource(rows_of(), prompter('pair'), 'causal')
    with torch.no_grad():
        together, alone = model(source.batch([(r, False) for r in range(6)])), torch.cat([model(source.batch([(r, False)])) for r in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# ---- symmetric and combined

@pytest.mark.parametrize('head', ['symmetric', 'combined'])
@pytest.mark.parametrize('family', DECODERS)
def test_symmetric_heads_cannot_have_an_order_bias(bases, family, head):
    model, rows = trained(ModelConfig(str(bases[family]), head=head, rank=4, quantization='none')), rows_of()
    mirror = datasets.Dataset.from_list([dict(prompt=r['prompt'], a=r['b'], b=r['a']) for r in rows])
    with torch.no_grad():
        given_, exchanged = (model(RowSource(x, prompter(head), 'causal').batch([(r, False) for r in range(6)])) for x in (rows, mirror))
    torch.testing.assert_close(exchange(exchanged), given_, rtol=1e-4, atol=1e-5)
    assert (exchanged - given_)[2:].abs().max() > 1e-3   # and A and B are told apart
    torch.testing.assert_close(given_[1, 0], given_[1, 1], rtol=1e-4, atol=1e-5)   # equal answers: equal chances


@pytest.mark.parametrize('name', ['mistral_window', 'llama3_rope'])
def test_symmetric_with_windows_and_scaled_positions(odd_bases, name):
    model, rows = trained(ModelConfig(str(odd_bases[name]), head='symmetric', rank=4, quantization='none')), rows_of(longest=30)
    mirror = datasets.Dataset.from_list([dict(prompt=r['prompt'], a=r['b'], b=r['a']) for r in rows])
    with torch.no_grad():
        given_, exchanged = (model(RowSource(x, prompter('symmetric'), 'causal').batch([(r, False) for r in range(6)])) for x in (rows, mirror))
    torch.testing.assert_close(exchange(exchanged), given_, rtol=1e-4, atol=1e-5)


def test_a_read_out_sees_the_second_answer_as_if_it_followed_the_first(bases):
    "With one layer, keys do not depend on what their token saw: the first read-out's state is that of the plain text prompt, A, B, ask."
    from underdog.model.model import load_backbone
    cfg, row = ModelConfig(str(bases['llama']), head='symmetric', layers=1, rank=4, quantization='none'), rows_of()[4]
    model, frame = load_model(cfg), FRAMES['symmetric']
    text = [1, *row['prompt'], 2, *row['a'], 3, *row['b'], 3, 8, 9]
    with torch.no_grad():
        states = model.features(pack([row_layout(frame, row, 'symmetric')], [0], [False]))
        plain = load_backbone(cfg)(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long)).last_hidden_state[0, -1]
    torch.testing.assert_close(states[0], plain, rtol=1e-4, atol=1e-5)


def test_combined_starts_as_pair(bases):
    rows, models = rows_of(), [load_model(ModelConfig(str(bases['llama']), head=h, rank=4, quantization='none')) for h in ('pair', 'combined')]
    with torch.no_grad(): pair, combined = (m(RowSource(rows, prompter(h), 'causal').batch([(r, False) for r in range(6)])) for m, h in zip(models, ('pair', 'combined')))
    torch.testing.assert_close(pair, combined, rtol=1e-4, atol=1e-6)


def test_symmetric_wants_a_decoder(bases):
    with pytest.raises(UserError, match="use head='pair'"): load_model(ModelConfig(str(bases['bert']), head='symmetric', quantization='none'))


# ---- plans

@settings(deadline=None)
@given(rows=st.lists(segments, min_size=1, max_size=4), head=st.sampled_from(list(FRAMES)), data=st.data())
def test_layouts_hold_the_sequences(rows, head, data):
    "What an output can see, in the order of positions, is exactly its sequence; every token lies in one span."
    orders = data.draw(st.sampled_from([(False,), (True,), (False, True)])) if head == 'joint' else (False,)
    layouts = [row_layout(FRAMES[head], r, head, orders, 'last') for r in rows]
    batch = pack(layouts, [i for i in range(len(rows)) for _ in orders], [o for _ in rows for o in orders], [len(orders)]*len(rows))
    assert sorted(t for s in batch.plan.spans for t in range(s.start, s.end)) == list(range(batch.tokens))
    text, at = batch.input_ids[0].tolist(), batch.plan.positions
    for j, last in enumerate(batch.last.tolist()):
        span = next(s for s in batch.plan.spans if s.start <= last < s.end)
        seen = sorted([(int(at[t]) + moved, text[t]) for a, b, moved in span.sees for t in range(a, b)] + [(int(at[t]), text[t]) for t in range(span.start, last + 1)])
        assert [p for p, _ in seen] == list(range(len(seen)))
        if head in ('pair', 'joint'):
            seqs = [s for r in rows for o in orders for s in sequences(FRAMES[head], r, head, o, 'last')]
            expected = [s for i in range(len(seqs)//len(batch.rows)) for s in seqs[i::len(seqs)//len(batch.rows)]][j]
            assert [t for _, t in seen] == expected.ids
            assert sorted(text[t] for t in batch.pool[batch.pool_of == j].tolist()) == sorted(expected.ids[slice(*expected.pool)])


def test_the_last_layer_is_computed_only_where_it_is_read(bases):
    from torch.utils.flop_counter import FlopCounterMode
    model, source = load_model(ModelConfig(str(bases['llama']), rank=4, pooling='read', quantization='none')), RowSource(rows_of(longest=40), prompter('pair'), 'causal')
    batch, layer = source.batch([(r, False) for r in range(6)]), model.backbone.get_base_model().layers[-1]
    def count(run):
        with torch.no_grad(), FlopCounterMode(display=False) as counter: result = run()
        return result, counter.get_total_flops()
    short, few = count(lambda: model(batch))
    whole = layer.forward.args[1]   # the layer as transformers made it
    partial, layer.forward = layer.forward, lambda *args, plan=None, **kwargs: whole(*args, plan=plan, **kwargs)
    model.planner.reads = False
    full, many = count(lambda: model(batch))
    layer.forward, model.planner.reads = partial, True
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)
    assert few < .75*many


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 800))
def test_bins_hold_every_row_once_within_the_budget(lengths, budget):
    for bins in (pack_bins(lengths, budget), pack_windows(lengths, budget, window=16)):
        assert sorted(int(r) for rows in bins for r in rows) == list(range(len(lengths)))
        for rows in bins: assert len(rows) and (len(rows) == 1 or sum(lengths[r] for r in rows) <= budget)
    full = pack_bins(lengths, budget)
    if lengths and max(lengths) <= budget: assert len(full) <= max(1, 2*sum(lengths)/budget)   # two bins at most half full would have been one


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
    assert set(batch.pool.tolist()) <= set(once.kept.tolist()) and once.kept.tolist() == sorted(set(once.kept.tolist()))
    assert [(s.start, s.end) for s in read_plan(once, once.kept.numpy()).spans] == [(s.start, s.end) for s in once.spans]


# ---- sources and predictions

@pytest.mark.parametrize('head', list(FRAMES))
@pytest.mark.parametrize('orders', [(False,), (False, True)])
def test_micro_batches_hold_every_presentation_once(head, orders):
    shown = present(list(range(6)), 'both' if len(orders) == 2 else 'given', head, np.random.default_rng(0))
    for packing in ['causal'] if head in ('symmetric', 'combined') else ['causal', 'bidirectional', '']:
        source = RowSource(rows_of(longest=30), prompter(head), packing)
        batches = source.micro_batches(shown, 90)
        assert len(batches) > 1
        assert sorted((int(r), bool(s)) for b in batches for r, s in zip(b.rows, b.swapped)) == sorted(shown)
        for b in batches: assert b.padded <= 90 or len(set(b.rows.tolist())) == 1


def test_both_orders_at_once_are_the_two_orders(bases):
    model, rows = trained(ModelConfig(str(bases['llama']), head='joint', rank=4, quantization='none')), np.arange(6)
    for packing in ('causal', ''):
        source = RowSource(rows_of(), prompter('joint'), packing)
        got = predict_both(model, source, rows, budget=64)
        one = predict_both(model, source, rows, tta=False, budget=64)
        np.testing.assert_allclose(got['one'], one['one'], rtol=1e-4, atol=1e-6)
        mirror = RowSource(datasets.Dataset.from_list([dict(prompt=r['prompt'], a=r['b'], b=r['a']) for r in rows_of()]), prompter('joint'), packing)
        np.testing.assert_allclose(predict_both(model, mirror, rows, budget=64)['both'][:, [1, 0, 2]], got['both'], rtol=1e-4, atol=1e-6)   # the law of TTA


def test_memory_that_runs_out_is_a_smaller_batch_not_another_result(bases, monkeypatch, capsys):
    from accelerate import Accelerator

    from underdog.training.loop import fit
    from underdog.training.settings import TrainConfig
    from underdog.training.step import FitData, Training
    y = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    def run(limit):
        torch.manual_seed(0)
        model = load_model(ModelConfig(str(bases['llama']), rank=4, quantization='none'))
        forward = model.forward
        def small_card(batch):
            if batch.tokens > limit: raise torch.OutOfMemoryError('as a GPU would')
            return forward(batch)
        monkeypatch.setattr(model, 'forward', small_card)
        cfg = TrainConfig(batch_rows=6, batch_tokens=1024, epochs=3., lr=1e-2, n_folds=2)
        fit(Training(model, FitData(RowSource(rows_of(), prompter('pair'), 'causal'), y, None, np.arange(6)), cfg, Accelerator(cpu=True)))
        return [p.detach().clone() for p in adapter_parameters(model)]
    free, tight = run(10**6), run(70)
    assert 'out of memory with 128 tokens in a forward pass: 64 from now on' in capsys.readouterr().out
    for a, b in zip(free, tight): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match='checkpointing=all'): run(0)


@pytest.mark.parametrize('orders', ['random', 'both', 'given'])
@pytest.mark.parametrize('head', [h for h in HEADS if len(HEADS[h].orders) == 1])
def test_a_symmetric_head_is_trained_on_rows_as_given(bases, head, orders):
    "Its layout has no order, so nothing may be exchanged on the way out: with `orders` random the labels of half the rows were."
    model, source, rng = trained(ModelConfig(str(bases['llama']), head=head, rank=4, quantization='none')), RowSource(rows_of(), prompter(head), 'causal'), np.random.default_rng(0)
    shown = present(list(range(6)), orders, head, rng)
    with torch.no_grad(): torch.testing.assert_close(model(source.batch(shown)), model(source.batch([(row, False) for row in range(6)])))
