"""Several processes: every part once, rows in order, equal to one process, nothing lost when a worker dies.

Other precisions, merged adapters, little memory."""
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import slow
import torch
from fixtures import predictions
from hypothesis import given
from hypothesis import strategies as st
from test_model import trained
from test_packing import prompter, rows_of

from underdog.core import UserError
from underdog.text.source import RowSource
from underdog.model.settings import ModelConfig
from underdog.model.predict import part_logits
from underdog.inference.job import Job, Part, merged_base, read_test, start_worker
from underdog.inference.settings import InferConfig
from underdog.inference.workers import WorkQueue, Workers


def quiet(text, **_): "A log that nobody reads."


def gone(workers): return not any(worker.process.is_alive() for worker in workers.alive.values())


EVENTS = st.tuples(st.sampled_from('abc'), st.sampled_from(['take', 'done', 'die']))


@given(st.integers(0, 30), st.lists(EVENTS, max_size=80))
def test_every_part_is_done_once_whoever_dies(n, events):
    queue, done = WorkQueue(n), []
    finish = [('z', event) for _ in range(n) for event in ('take', 'done')]   # a worker that lives to the end
    for worker, event in events + finish + [(w, 'die') for w in 'abc'] + finish:
        held = queue.held.get(worker, [])
        if event == 'take': queue.take(worker)
        elif event == 'die': queue.hand_back(worker)
        elif held:
            done.append(held[0])
            queue.done(worker, held[0])
    assert sorted(done + queue.dropped) == list(range(n)) and queue.left == 0
    assert all(queue.deaths[i] == 2 for i in queue.dropped)   # only what took two workers with it is given up


def test_what_comes_back_goes_first():
    queue = WorkQueue(6)
    for worker in 'aab': queue.take(worker)
    assert queue.hand_back('a') == [0, 1] and [queue.take('b') for _ in range(3)] == [0, 1, 3]


def squares(marker, device):
    "A worker's start: squares; on a bad device the process is killed in its second part, once or (no marker) always."
    count = []

    def compute(x):
        count.append(x)
        if device == 'bad' and len(count) == 2 and not (marker and Path(marker).exists()):
            if marker: Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x*x
    if device == 'broken': raise UserError('this device is broken')
    return compute


def poison(device):
    "A worker's start: part 7 kills whoever touches it."
    def compute(x):
        if x == 7: os.kill(os.getpid(), signal.SIGKILL)
        return x*x
    return compute


@pytest.mark.parametrize('devices', [pytest.param(['cpu'], marks=slow), ['cpu', 'cpu']])
def test_a_part_that_kills_costs_itself_only(devices):
    "And of each it is said once that it was given up, not again when a worker dies later."
    parts, results, messages = [*range(20), *[7]*(len(devices) - 1)], {}, []
    lost = [i for i, x in enumerate(parts) if x == 7]
    def note(text, **_): messages.append(text)
    with Workers(poison, devices) as workers: assert workers.run(parts, results.__setitem__, note) == lost
    assert results == {i: i*i for i in range(20) if i != 7}
    assert len(messages) == 2*len(lost) and sum('given up' in text for text in messages) == len(lost)


def slowing(device):
    "A worker's start: twenty milliseconds a part at first, ten times that from the tenth on; forever at 99."
    count = []

    def compute(x):
        count.append(x)
        if x == 99: time.sleep(1000)
        time.sleep(.02 if len(count) < 10 else .2)
        return x
    return compute


@pytest.mark.parametrize('parts,least', [(list(range(98)), 12), ([0, 1, 2, 99, *range(4, 98)], 3)])
def test_a_deadline_is_kept_by_slow_and_by_hanging_workers(parts, least):
    "What is done is done once and in order of the parts; a worker that hangs is killed at the deadline."
    results = {}
    with Workers(slowing, ['cpu', 'cpu']) as workers:
        workers.wait_until_ready()
        end = time.monotonic() + 1.5
        assert workers.run(parts, results.__setitem__, quiet, costs=[1]*len(parts), end=end) == []
        assert time.monotonic() < end + 30   # and not a thousand
    assert least <= len(results) < len(parts) and all(parts[i] == r for i, r in results.items())
    assert gone(workers)


@pytest.mark.parametrize('devices', [pytest.param(['good', 'bad'], marks=slow), ['bad', 'good', 'broken']])
def test_a_dead_worker_loses_nothing(devices, tmp_path):
    results, messages = {}, []
    def note(text, **_): messages.append(text)

    def done(i, result):
        assert i not in results
        results[i] = result
    with Workers(partial(squares, str(tmp_path/'marker')), devices) as workers:
        workers.run(list(range(60)), done, note)
    assert results == {i: i*i for i in range(60)}
    assert len(messages) <= len(devices) - 1 and all('go back into the queue' in text for text in messages)
    assert gone(workers)


def test_no_worker_left_says_why():
    with Workers(partial(squares, ''), ['bad', 'broken']) as workers:
        with pytest.raises(RuntimeError, match='57 of 60 parts') as e:
            workers.run(list(range(60)), lambda i, result: None, quiet)
    assert 'worker 0 on bad: ended with code -9' in str(e.value) and 'this device is broken' in str(e.value)


def test_a_mistake_of_the_users_is_told_once_and_alone():
    with Workers(partial(squares, ''), ['broken', 'broken']) as workers:
        with pytest.raises(UserError) as e: workers.run(list(range(60)), lambda i, result: None, quiet)
    assert str(e.value) == 'this device is broken'


def same(a, b, **tolerance):
    columns = [c for c in a if c.startswith(('p_', 'one_'))]
    assert a['id'].tolist() == b['id'].tolist()
    np.testing.assert_allclose(a[columns], b[columns], **tolerance)


def test_two_processes_predict_what_one_does(world, finished, tmp_path):
    "In small parts, so that both have work; bit by bit, as the parts are the same."
    one = infer_here(finished, world/'test.csv', tmp_path/'one', batch_tokens=400)
    two = predictions(finished.path, world/'test.csv', tmp_path/'two', InferConfig(batch_tokens=400, processes=2))
    pd.testing.assert_frame_equal(one, two)


def dying(run, files, device, cfg, marker):
    "The real worker's start, killed once in its second part."
    compute, count = start_worker(run, files, device, cfg), []

    def killed_once(part):
        count.append(part)
        if len(count) == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(part)
    return killed_once


def test_a_killed_process_loses_no_row(world, finished, tmp_path):
    files, cfg, marker = finished.config['tokens'], InferConfig(), tmp_path/'marker'
    parts = [Part(list(range(i, i + 5)), (False,)) for i in range(0, 60, 5)]
    alone, shared = {}, {}
    compute = start_worker(finished.path, files, 'cpu', cfg)
    for i, part in enumerate(parts): alone[i] = compute(part)
    start = partial(dying, finished.path, files, cfg=cfg, marker=marker)
    with Workers(start, ['cpu', 'cpu']) as workers: workers.run(parts, shared.__setitem__)
    assert marker.exists() and sorted(shared) == list(range(len(parts)))
    for i in alone: np.testing.assert_array_equal(alone[i], shared[i])


def infer_here(run, test_csv, out, **changes):
    "The predictions of a run, computed in this process."
    out.mkdir()
    job = Job(run, read_test(run, test_csv), InferConfig(**changes)).open()
    with merged_base(job) as merged:
        compute = job.start(merged)('cpu')
        for part in job.parts(job.orders)[0]: job.take(part, compute(part))
    job.write(out)
    return pd.read_parquet(out/'predictions.parquet')


@pytest.fixture(scope='module')
def plain(world, finished, tmp_path_factory):
    return infer_here(finished, world/'test.csv', tmp_path_factory.mktemp('plain')/'out')


@pytest.mark.parametrize('changes,tolerance', [
    (dict(merge=True), 1e-5), (dict(quantization='int8', int8_threshold=0.), .05),
    (dict(quantization='nf4', merge=True), .1), (dict(dtype='bfloat16'), .05)])
def test_other_precisions_are_near(world, finished, plain, tmp_path, changes, tolerance):
    other = infer_here(finished, world/'test.csv', tmp_path/'out', **changes)
    same(plain, other, atol=tolerance)
    if 'merge' not in changes: assert not np.array_equal(plain['p_a'], other['p_a'])
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['predictions.parquet']   # the merged copy is gone


@pytest.mark.parametrize('wrong,match', [
    (dict(processes=-1), 'one per GPU'), (dict(quantization='int3'), 'int8'), (dict(dtype='fp16'), 'float16'),
    (dict(batch_tokens=0), 'above 0')])
def test_settings_that_cannot_work(wrong, match):
    with pytest.raises(UserError, match=match): InferConfig(**wrong)


def test_memory_that_runs_out_halves_the_batch_and_changes_no_row(bases, monkeypatch, capsys):
    model = trained(ModelConfig(str(bases['llama']), head='joint', rank=4, quantization='none'))
    source, rows, orders = RowSource(rows_of(8), prompter('joint'), 'causal'), list(range(8)), (False, True)
    expected, forward = part_logits(model, source, rows, orders), type(model).forward

    def tight(self, batch):
        if batch.tokens > 150: raise torch.OutOfMemoryError('as a GPU would')
        return forward(self, batch)
    monkeypatch.setattr(type(model), 'forward', tight)
    assert torch.allclose(part_logits(model, source, rows, orders), expected, atol=1e-5)
    assert 'from now on' in capsys.readouterr().out
    # what has been learned is not tried again
    assert torch.allclose(part_logits(model, source, rows, orders), expected, atol=1e-5)
    assert 'out of memory' not in capsys.readouterr().out
    # nor is any row left out where each has to be shown in one order at a time
    model.fitting_tokens = 1
    assert torch.allclose(part_logits(model, source, rows, orders), expected, atol=1e-5)

    def none_left(self, batch): raise torch.OutOfMemoryError
    monkeypatch.setattr(type(model), 'forward', none_left)
    with pytest.raises(UserError, match='a single row'): part_logits(model, source, rows, orders)
