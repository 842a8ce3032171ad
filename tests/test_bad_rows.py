"A row that fp16 does not hold costs that row: not its batch, not the loss scale, not the evaluation, not the run."
import errno
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures import by_two_processes, make_base, small_run
from safetensors.torch import load_file, save_file
from test_resume import Watched, beginner

from underdog.core import UserError
from underdog.session import Session
from underdog.runfolder import RunFolder, columns
from underdog.data.competition import LMSYS
from underdog.text.prompt import PromptConfig
from underdog.model.settings import ModelConfig
from underdog.training import record
from underdog.training.health import Health, Unhealthy
from underdog.training.loop import fit
from underdog.training.prepare import describe, prepare
from underdog.training.probe import start_from_probe
from underdog.training.record import Recorder
from underdog.training.schedule import sample_prompts
from underdog.training.settings import TrainConfig
from underdog.training.worker import LOSS_SCALE, start


def spoil(training, rows):
    "Let the logits of `rows` be NaN, and so the gradients of every batch that holds one of them."
    forward = training.model.forward

    def spoiled(batch):
        bad = torch.isin(batch.rows, torch.tensor(list(rows)))
        return forward(batch)*torch.where(bad, float('nan'), 1.)[:, None]
    training.model.forward = spoiled


def gradients(training, shown, weight):
    "What `backward` says, and the gradients that it leaves."
    training.optimizer.zero_grad()
    computed = training.backward(shown, weight)
    return computed, [p.grad.clone() for p in training.params]


# ---- a step
@pytest.mark.parametrize('head,orders', [('pair', (False,)), ('joint', (False, True))])
def test_the_other_rows_of_its_batch_keep_their_gradients_and_their_weight(world, head, orders):
    training = beginner(world, head=head)()
    training.model.eval()   # no dropout, which would depend on the batch
    rows = training.plan[0]
    shown = [(row, order) for row in rows for order in orders]
    others = [(row, order) for row, order in shown if row != rows[2]]
    wanted, expected = gradients(training, others, weight=1/len(shown))
    spoil(training, [rows[2]])
    computed, left = gradients(training, shown, weight=1/len(shown))
    assert computed.not_finite == 1 and computed.loss == pytest.approx(wanted.loss, rel=1e-5)
    for p, q in zip(left, expected): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_step_is_made_without_the_bad_row_and_counts_it(world):
    training = beginner(world, epochs=3.)()
    training.model.eval()
    spoil(training, training.plan[0][:1])
    before = {n: p.clone() for n, p in training.trained().items()}
    figures = training.step()
    assert figures['not_finite'] == 1 and not figures['skipped']
    # the loss is the mean of the others: near log 3, as the head is fresh
    assert .8 < figures['loss'] < 1.4 and training.at.loss == figures['loss']
    assert any(not torch.equal(p, before[n]) for n, p in training.trained().items())


def test_one_bad_row_in_a_hundred_steps_leaves_the_loss_scale_alone(world, monkeypatch):
    """3,000 steps with torch's own scaler, of which one in a hundred has a bad row.

    A backward pass from such a row halves the scale each time: 30 times in all, and it doubles once in 2,000 good
    steps; 1e-7 is what is left of it, and every gradient in half precision is 0."""
    training = beginner(world)()
    scaler = torch.amp.GradScaler('cpu', **LOSS_SCALE)
    training.accelerator.scaler = training.optimizer.scaler = scaler
    training.optimizer.__init__(training.optimizer.optimizer, scaler=scaler)
    # a model that costs nothing: its weights are the sum of the head's, bad rows have NaN
    weight, bad = training.model.head.score.weight, set()
    def forward(batch):
        factor = torch.tensor([float('nan') if int(row) in bad else 1. for row in batch.rows])
        return (weight.sum()*factor)[:, None].expand(-1, 3)*torch.tensor([1., -1., 0.])
    monkeypatch.setattr(training.model, 'forward', forward)
    shown = [(row, False) for row in training.plan[0]]
    batches = {n: training.data.source.micro_batches(shown[-n:], 10**6) for n in (7, 8)}
    monkeypatch.setattr(training.data.source, 'micro_batches', lambda shown, budget: batches[len(shown)])
    skipped, lost = 0, 0
    for step in range(3000):
        bad.clear()
        if step % 100 == 50: bad.add(int(shown[0][0]))
        lost += training.backward(shown, weight=1/8).not_finite
        skipped += training._update()['skipped']
    assert lost == 30 and skipped == 0
    assert scaler.get_scale() >= LOSS_SCALE['init_scale']


def test_a_scale_recovers_within_a_run():
    "After an overflow that took it down by 2^10, two thousand steps bring it back."
    assert 10*LOSS_SCALE['growth_interval'] <= 2000 and LOSS_SCALE['init_scale'] == 2**16


# ---- a run
@pytest.mark.parametrize('bad,ends', [(1, False), (2, True)])
def test_few_bad_rows_are_said_and_many_end_the_run(world, bad, ends, capsys):
    "Of 32 rows in turn: one is 3 %, two are 6 %."
    training = beginner(world, epochs=8., lr=1e-4, head_lr=1e-4)()
    spoil(training, range(bad))
    if ends:
        with pytest.raises(Unhealthy, match='of the last 160 rows gave a loss that is not finite.*bfloat16'):
            fit(training, Watched())
        assert 20 <= training.at.step < len(training.plan)
    else: assert fit(training, Watched()) == ''
    assert 'gave a loss that is not finite' in capsys.readouterr().out


def test_it_is_said_at_the_first_and_at_ten_times_as_many():
    said = []
    health = Health(say=said.append)
    for step in range(1, 1001):
        bad = int(step % 10 == 0)
        health.look(step, loss=1., prior_loss=1., head_norm=1., adapter_norm=1., rows=16, not_finite=bad)
    assert [text.split()[1] for text in said] == ['1', '10', '100']


def test_a_run_that_ends_in_steps_without_a_loss_has_failed(world):
    "Two steps of two: three in a row there never were."
    training = beginner(world, epochs=.5)()
    assert len(training.plan) == 2
    spoil(training, range(40))
    with pytest.raises(Unhealthy, match='bfloat16'): fit(training, Watched())
    # but one bad row that happens to be the last
    training = beginner(world, epochs=17/32)()
    assert [len(rows) for rows in training.plan] == [8, 8, 1]
    spoil(training, training.plan[2])
    assert fit(training, Watched()) == ''


@pytest.fixture
def broken_base(world, tmp_path):
    "A base model with a weight that is not finite."
    base = Path(make_base(tmp_path/'broken'/'llama'))
    weights = load_file(base/'model.safetensors')
    weights['norm.weight'][:] = float('nan')
    save_file(weights, base/'model.safetensors', metadata=dict(format='pt'))
    for name in ('train.csv', 'test.csv'): (tmp_path/'broken'/name).symlink_to(world/name)
    return tmp_path/'broken'


def test_a_model_without_finite_logits_is_never_finished(broken_base, tmp_path):
    with pytest.raises(UserError, match='no row of the last steps'):
        small_run(broken_base, tmp_path/'run', epochs=.25, probe_rows=0, fold=-1)
    run = RunFolder(tmp_path/'run')
    assert run.status['state'] == 'failed' and not run.trained


def test_a_probe_leaves_bad_rows_out_and_refuses_a_model_that_has_no_others(world):
    training = beginner(world)()
    groups, features = np.arange(40), training.model.features
    def spoiled(rows):
        bad = torch.tensor(list(rows))
        factor = lambda batch: torch.where(torch.isin(batch.rows, bad), float('nan'), 1.).repeat(2)[:, None]
        return lambda batch: features(batch)*factor(batch)
    training.model.features = spoiled([3])
    assert 'on 31 rows' in start_from_probe(training.model, training.data, groups, 2000)
    assert training.model.head.score.weight.isfinite().all()
    training.model.features = spoiled(range(40))
    with pytest.raises(Unhealthy, match='hidden states of all 32 rows'):
        start_from_probe(training.model, training.data, groups, 2000)


# ---- an evaluation
@pytest.fixture
def recorded(world, tmp_path):
    "A function that begins a run with a run folder in this process; gives its recorder."
    from accelerate import Accelerator

    def begin(**changes):
        cfg = TrainConfig(**dict(n_folds=3, batch_rows=8, probe_rows=0, shrink='none') | changes)
        model = ModelConfig(str(world/'llama'), quantization='none', rank=4)
        described = describe(world/'train.csv', model, PromptConfig(max_length=128, min_keep=4), cfg)
        run = prepare(tmp_path/'run', described)
        training, table = start(run, cfg, Accelerator(cpu=True))
        return Recorder(run, training, table, comp=LMSYS, session=Session())
    return begin


@pytest.mark.parametrize('begins', ['floors', 'none'])
def test_held_out_rows_without_finite_logits_get_the_best_baseline(recorded, begins, capsys):
    recorder = recorded(start=begins)
    run, training = recorder.run, recorder.training
    held, last = training.data.held, len(training.plan)
    spoil(training, held[:2])
    assert recorder.evaluate(last)
    oof, line = run.oof(), run.metrics().iloc[-1]
    baseline = oof[columns(f"floor_{run.config['best_floor']}", LMSYS)].to_numpy()
    for prefix in ('p', 'one'):
        p = oof[columns(prefix, LMSYS)].to_numpy()
        np.testing.assert_allclose(p[:2], baseline[:2], rtol=1e-5)
        assert np.isfinite(p).all() and not np.allclose(p[2:], baseline[2:], rtol=1e-5)
    assert np.isfinite(oof[columns('l', LMSYS)]).all(axis=None)
    assert line['eval_not_finite'] == 2 and np.isfinite(line['eval_loss'])
    assert '2 of them have no finite logits' in capsys.readouterr().out
    # with less than half of them there is nothing to go on with
    spoil(training, held[:len(held)//2 + 1])
    with pytest.raises(Unhealthy, match=f'{len(held)//2 + 1} of {len(held)} held-out rows'): recorder.evaluate(last)
    spoil(training, held)
    with pytest.raises(Unhealthy, match=f'all {len(held)} held-out rows'): recorder.evaluate(last)


def test_an_evaluation_on_the_way_takes_whole_prompts_and_the_last_one_all_rows(recorded):
    recorder = recorded(eval_rows=7, evaluations=3)
    run, training, table = recorder.run, recorder.training, recorder.table
    held, steps = training.data.held, training.evaluations
    losses, sizes = [], []
    for step in steps:
        assert recorder.evaluate(step)
        oof = run.oof()
        line = run.metrics().iloc[-1]
        sizes.append(int(line['eval_rows']))
        # baselines of the same rows
        p = oof[columns('floor_length', LMSYS)].to_numpy()
        y = oof[columns('y', LMSYS)].to_numpy()
        assert line['eval_length'] == pytest.approx(-(y*np.log(p)).sum(1).mean())
        losses.append(line['eval_loss'])
    assert sizes == [sizes[0], sizes[0], len(held)] and sizes[0] <= 7 < len(held)
    # the same rows each time, and nothing was learned between
    assert losses[0] == losses[1]
    assert sorted(oof['id']) == sorted(table.iloc[held]['id'])
    # the time that is left for each
    training.evaluation_pace, training.at.evaluated = 1., False
    asked = []
    for step in steps:
        training.at.step = step
        asked.append(training.next_s())
    assert asked[0] == asked[1] < asked[2] == training.data.source.lengths[held].sum()


@pytest.mark.parametrize('most', [1, 10, 57, 1000, 0])
def test_a_sample_has_whole_prompts_and_is_always_the_same(most):
    groups = np.random.default_rng(0).integers(0, 60, 300)
    rows = np.flatnonzero(groups % 3 == 0)
    sample = sample_prompts(rows, groups, most, seed=1)
    assert np.array_equal(sample, sample_prompts(rows, groups, most, seed=1)) and set(sample) <= set(rows)
    assert all(np.isin(rows[groups[rows] == g], sample).all() for g in groups[sample])
    if most == 0 or most >= len(rows): assert np.array_equal(sample, rows)
    else: assert len(sample) <= most or len(set(groups[sample])) == 1


# ---- several processes
TWO = '''
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from test_bad_rows import spoil
from test_resume import beginner
from underdog.training import probe as module
from underdog.training.probe import start_from_probe
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
training = beginner(Path(sys.argv[2]), epochs=2., lr=1e-3)()
digest = lambda: gather_object([float(sum(p.detach().double().abs().sum() for p in training.trained().values()))])
# the probe: a process whose arithmetic differs in the last digits
fit_probe = module.fit_probe
module.fit_probe = lambda x, *args, **kwargs: fit_probe(x*(1 + 1e-3*rank), *args, **kwargs)
start_from_probe(training.model, training.data, np.arange(40), 2000, accelerator=accelerator)
out = dict(probe=digest())
# a step in which the rows of the second process are bad, then one in which all are
shown = [(row, False) for row in training.plan[0]]
spoil(training, [row for row, _ in training._share(shown, training.plan[0])] if rank else [])
one = training.step()
out['one'] = dict(lost=one['not_finite'], skipped=one['skipped'], weights=digest())
spoil(training, range(40))
none = training.step()
out['none'] = dict(lost=none['not_finite'], skipped=none['skipped'], weights=digest())
if rank == 0: Path(sys.argv[3]).write_text(json.dumps(out))
'''


def test_two_processes_agree_on_the_probe_and_on_what_is_left_out(world, tmp_path):
    out = by_two_processes(TWO, world, tmp_path)
    assert out['probe'][0] == out['probe'][1]
    # one process has nothing to add: the step is made with the rows of the other, and both make it
    assert 0 < out['one']['lost'] < 8 and not out['one']['skipped']
    assert out['one']['weights'][0] == out['one']['weights'][1] != out['probe'][0]
    # nothing at all: no weight is changed
    assert out['none']['lost'] == 8 and out['none']['skipped']
    assert out['none']['weights'] == out['one']['weights']


def test_weights_that_the_last_step_spoilt_are_not_written(recorded):
    "Where no row is held out nothing else would show it."
    recorder = recorded(fold=-1)
    with torch.no_grad(): recorder.training.model.head.score.weight[0, 0] = float('inf')
    with pytest.raises(Unhealthy, match='1 of .* trained weights are not finite.*head'): recorder.finish('')
    assert not recorder.run.trained and recorder.run.status['state'] == 'running'


# ---- a full disk
def full_disk(times, call=lambda *args, **kwargs: None):
    "`call`, for which the disk is full the first `times` times."
    failures = iter(range(times))
    def called(*args, **kwargs):
        if next(failures, None) is None: return call(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return called


def test_a_full_disk_costs_predictions_on_the_way_but_not_the_last_ones(recorded, monkeypatch, capsys):
    recorder = recorded(evaluations=2)
    first, last = recorder.training.evaluations
    monkeypatch.setattr(pd.DataFrame, 'to_parquet', full_disk(9))
    assert recorder.evaluate(first)
    assert f'predictions of step {first} were not written' in capsys.readouterr().out
    assert not recorder.run.oof_file.exists() and 'eval_loss' in recorder.run.metrics()
    with pytest.raises(OSError, match='No space'): recorder.evaluate(last)
    assert not list(recorder.run.path.glob('.oof*'))


def test_the_older_checkpoint_makes_room_for_the_adapter(recorded, monkeypatch):
    recorder = recorded()
    for step in (1, 2): recorder.checkpoints.save(step, dict(step=step))
    monkeypatch.setattr(record, 'save_adapter', full_disk(9))
    with pytest.raises(OSError, match='No space'): recorder.finish('')
    assert recorder.checkpoints.steps() == [2] and recorder.run.status['state'] != 'finished'
    recorder.checkpoints.save(1, dict(step=1))
    monkeypatch.setattr(record, 'save_adapter', full_disk(1))
    recorder.finish('')
    assert recorder.run.status['state'] == 'finished' and recorder.checkpoints.steps() == []
