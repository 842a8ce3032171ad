"Laws of layout.py, bins.py and batch.py: every row once, within the budget, masked right."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from underdog.core import UserError
from underdog.text.batch import collate
from underdog.text.bins import padding_report, plan_batches
from underdog.text.layout import sequences

lengths_of_rows = st.lists(st.integers(1, 300), max_size=60)
ids = st.lists(st.integers(10, 99), max_size=12)
rows_of_ids = st.fixed_dictionaries(dict(prompt=ids, a=ids, b=ids))
PAIR = dict(start=[1], middle=[2], end=[3], read='last')
JOINT = dict(start=[1], label_a=[4], label_b=[5], end=[3], read='first')
FRAMES = dict(pair=PAIR, joint=JOINT)


@settings(deadline=None)
@given(lengths=lengths_of_rows, budget=st.integers(1, 800))
def test_every_row_once_and_within_the_budget(lengths, budget):
    plan = plan_batches(lengths, budget)
    assert sorted(int(row) for rows in plan for row in rows) == list(range(len(lengths)))
    for rows in plan:
        assert len(rows)
        assert len(rows) == 1 or max(lengths[row] for row in rows)*len(rows) <= budget
    report = padding_report(lengths, plan)
    assert report['real'] == sum(lengths) <= report['padded'] and 0 < report['efficiency'] <= 1


@settings(deadline=None)
@given(lengths=lengths_of_rows, budget=st.integers(1, 800))
def test_long_rows_come_first_and_a_batch_takes_what_fits(lengths, budget):
    plan = plan_batches(lengths, budget)
    in_plan = [lengths[row] for rows in plan for row in rows]
    assert in_plan == sorted(lengths, reverse=True)
    for rows, _ in zip(plan, plan[1:]): assert lengths[rows[0]]*(len(rows) + 1) > budget   # the next row had no place


def test_batches_by_length_pad_less_than_rows_as_they_come():
    lengths = np.random.default_rng(0).integers(10, 1000, 500)
    by_length = plan_batches(lengths, 4096)
    as_they_come = np.array_split(np.arange(500), len(by_length))
    assert lengths[by_length[0][0]] == lengths.max()
    assert padding_report(lengths, by_length)['efficiency'] > .9 > padding_report(lengths, as_they_come)['efficiency']


def test_nothing_to_plan():
    assert plan_batches([], 10) == []
    assert padding_report([], [])['efficiency'] == 1


@pytest.mark.parametrize('head', ['pair', 'joint'])
@settings(deadline=None)
@given(rows=st.lists(rows_of_ids, min_size=1, max_size=6), data=st.data())
def test_masks_show_real_tokens_and_nothing_else(head, rows, data):
    n = len(rows)
    swapped = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    seqs = [sequences(FRAMES[head], seg, head, swap) for seg, swap in zip(rows, swapped)]
    batch = collate(seqs, range(n), swapped, pad_id=0)
    flat = [of_row[i] for i in range(len(seqs[0])) for of_row in seqs]
    assert len(batch.input_ids) == len(flat) == (2*n if head == 'pair' else n)
    assert batch.rows.tolist() == list(range(n)) and batch.swapped.tolist() == swapped
    for i, s in enumerate(flat):
        line, mask, pool = batch.input_ids[i], batch.attention_mask[i], batch.pool_mask[i]
        # real tokens, then padding
        assert line[mask.bool()].tolist() == s.ids and mask.sum() == len(s.ids)
        assert not line[len(s.ids):].any()
        # what is pooled and read is real
        assert line[pool.bool()].tolist() == s.ids[slice(*s.pool)] and pool.sum() >= 1
        assert (pool <= mask).all() and mask[batch.read[i]] == 1
    assert batch.tokens == sum(len(s.ids) for s in flat) <= batch.padded == batch.input_ids.numel()


def test_types_of_a_batch():
    batch = collate([sequences(PAIR, dict(prompt=[10], a=[11], b=[]), 'pair')], [4], [False], pad_id=0)
    for name in ('input_ids', 'attention_mask', 'read', 'rows'): assert getattr(batch, name).dtype == torch.int64
    assert batch.pool_mask.dtype == torch.float32 and batch.swapped.dtype == torch.bool


@settings(deadline=None)
@given(seg=rows_of_ids)
def test_layouts(seg):
    exchanged = dict(prompt=seg['prompt'], a=seg['b'], b=seg['a'])
    for head, frame in FRAMES.items():
        assert sequences(frame, seg, head, swapped=True) == sequences(frame, exchanged, head)
    first, second = sequences(PAIR, seg, 'pair')
    assert first.ids == [1, *seg['prompt'], 2, *seg['a'], 3]
    assert second.ids == [1, *seg['prompt'], 2, *seg['b'], 3]
    assert first.ids[slice(*first.pool)] == (seg['a'] or [3]) and first.ids[first.read] == 3
    joint, = sequences(JOINT, seg, 'joint')
    assert joint.ids == [1, *seg['prompt'], 4, *seg['a'], 5, *seg['b'], 3]
    assert joint.pool == (0, len(joint.ids)) and joint.read == 0
    assert sequences(JOINT, seg, 'joint', read='last')[0].read == len(joint.ids) - 1


def test_a_batch_moves_whole():
    batch = collate([sequences(PAIR, dict(prompt=[10], a=[11], b=[]), 'pair')], [4], [False], pad_id=0).to('meta')
    assert all(v.device.type == 'meta' for v in vars(batch).values())


def test_mistakes():
    with pytest.raises(UserError, match='token budget'): plan_batches([3], 0)
    with pytest.raises(ValueError, match='at least one row'): collate([], [], [], 0)
    empty = dict(prompt=[], a=[], b=[])
    one, two = (sequences(FRAMES[head], empty, head) for head in ('joint', 'pair'))
    with pytest.raises(ValueError, match='same number of sequences'): collate([one, two], [0, 1], [False]*2, 0)
