"Laws of layout.py and batch.py: every row once, within the budget, masked right, back in order."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from underdog.text.batch import collate, padding_report, plan_batches, restore
from underdog.core import UserError
from underdog.text.layout import sequences

lengths_of_rows = st.lists(st.integers(1, 300), max_size=60)
ids = st.lists(st.integers(10, 99), max_size=12)
PAIR, JOINT = dict(start=[1], middle=[2], end=[3], read='last'), dict(start=[1], label_a=[4], label_b=[5], end=[3], read='first')


@settings(deadline=None)
@given(lengths=lengths_of_rows, budget=st.integers(1, 800), order=st.sampled_from(['length', 'given']), seed=st.sampled_from([None, 0, 7]))
def test_every_row_once_and_within_the_budget(lengths, budget, order, seed):
    plan = plan_batches(lengths, budget, order, seed)
    assert sorted(int(r) for rows in plan for r in rows) == list(range(len(lengths)))
    for rows in plan: assert len(rows) and (len(rows) == 1 or max(lengths[r] for r in rows)*len(rows) <= budget)
    report = padding_report(lengths, plan)
    assert report['real'] == sum(lengths) <= report['padded'] and 0 < report['efficiency'] <= 1
    assert [rows.tolist() for rows in plan] == [rows.tolist() for rows in plan_batches(lengths, budget, order, seed)]


@settings(deadline=None)
@given(lengths=lengths_of_rows, budget=st.integers(1, 800), order=st.sampled_from(['length', 'given']), seed=st.sampled_from([None, 3]))
def test_results_come_back_in_order(lengths, budget, order, seed):
    plan = plan_batches(lengths, budget, order, seed)
    values = np.arange(len(lengths)*2).reshape(-1, 2)
    if not lengths: return
    assert (restore(plan, [values[rows] for rows in plan]) == values).all()
    assert torch.equal(restore(plan, [torch.from_numpy(values[rows]) for rows in plan]), torch.from_numpy(values))
    assert (restore(plan, np.concatenate([values[rows] for rows in plan])) == values).all()


def test_given_order_is_kept_and_length_order_pads_less():
    lengths = np.random.default_rng(0).integers(10, 1000, 500)
    given, sorted_ = plan_batches(lengths, 4096, 'given'), plan_batches(lengths, 4096)
    assert np.concatenate(given).tolist() == list(range(500))
    assert lengths[sorted_[0][0]] == lengths.max()
    assert padding_report(lengths, sorted_)['efficiency'] > .9 > padding_report(lengths, given)['efficiency']


def test_nothing_to_plan(): assert plan_batches([], 10) == [] and padding_report([], [])['efficiency'] == 1 and len(restore([], [])) == 0


@pytest.mark.parametrize('head', ['pair', 'joint'])
@settings(deadline=None)
@given(rows=st.lists(st.fixed_dictionaries(dict(prompt=ids, a=ids, b=ids)), min_size=1, max_size=6), data=st.data())
def test_masks_show_real_tokens_and_nothing_else(head, rows, data):
    frame, swapped = (PAIR if head == 'pair' else JOINT), data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    seqs = [sequences(frame, seg, head, s) for seg, s in zip(rows, swapped)]
    batch = collate(seqs, range(len(rows)), swapped, pad_id=0)
    flat = [s[i] for i in range(len(seqs[0])) for s in seqs]
    n = len(rows)
    assert len(batch.input_ids) == len(flat) == (2*n if head == 'pair' else n) and batch.rows.tolist() == list(range(n)) and batch.swapped.tolist() == swapped
    for got, mask, pool, read, s in zip(batch.input_ids, batch.attention_mask, batch.pool_mask, batch.read, flat):
        assert got[mask.bool()].tolist() == s.ids and mask.sum() == len(s.ids) and not got[len(s.ids):].any()
        assert got[pool.bool()].tolist() == s.ids[s.pool[0]:s.pool[1]] and pool.sum() >= 1 and (pool <= mask).all() and mask[read] == 1
    assert batch.tokens == sum(len(s.ids) for s in flat) <= batch.padded == batch.input_ids.numel()
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.pool_mask.dtype, batch.read.dtype) == (torch.int64, torch.int64, torch.float32, torch.int64)
    assert (batch.rows.dtype, batch.swapped.dtype) == (torch.int64, torch.bool)


@settings(deadline=None)
@given(seg=st.fixed_dictionaries(dict(prompt=ids, a=ids, b=ids)))
def test_layouts(seg):
    exchanged = dict(prompt=seg['prompt'], a=seg['b'], b=seg['a'])
    for frame, head in ((PAIR, 'pair'), (JOINT, 'joint')):
        assert sequences(frame, seg, head, swapped=True) == sequences(frame, exchanged, head)
    first, second = sequences(PAIR, seg, 'pair')
    assert first.ids == [1, *seg['prompt'], 2, *seg['a'], 3] and second.ids == [1, *seg['prompt'], 2, *seg['b'], 3]
    assert first.ids[slice(*first.pool)] == (seg['a'] or [3]) and first.ids[first.read] == 3
    joint, = sequences(JOINT, seg, 'joint')
    assert joint.ids == [1, *seg['prompt'], 4, *seg['a'], 5, *seg['b'], 3] and joint.pool == (0, len(joint.ids)) and joint.read == 0
    assert sequences(JOINT, seg, 'joint', read='last')[0].read == len(joint.ids) - 1


def test_a_batch_moves_whole():
    batch = collate([sequences(PAIR, dict(prompt=[10], a=[11], b=[]), 'pair')], [4], [False], pad_id=0).to('meta')
    assert all(v.device.type == 'meta' for v in vars(batch).values())


def test_mistakes():
    with pytest.raises(UserError, match='token budget'): plan_batches([3], 0)
    with pytest.raises(UserError, match="'length' or 'given'"): plan_batches([3], 10, order='random')
    with pytest.raises(ValueError, match='exactly once'): restore([[0, 2]], np.zeros(2))
    with pytest.raises(ValueError, match='2 values for 3 rows'): restore([[0, 1, 2]], np.zeros(2))
    with pytest.raises(ValueError, match='at least one row'): collate([], [], [], 0)
