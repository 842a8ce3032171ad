"Interrupted is uninterrupted: bit-equal resume at every step, kills, signals, a full disk, broken checkpoints, two writers."
import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import slow
from fixtures import small_run

from underdog.training.checkpoint import Checkpoints
from underdog.data.competition import LMSYS
from underdog.core import UserError, read_json, remove_temporaries
from underdog.machine import cache_folder
from underdog.runfolder import RunFolder
from underdog.data.folds import labels_of
from underdog.data.rows import read_rows
from underdog.training.health import Health, Unhealthy
from underdog.model.model import ModelConfig, load_model
from underdog.training.prepare import differences
from underdog.text.prompt import PromptConfig, Prompter, tokenize_rows
from underdog.session import Clock, Session, locked
from underdog.text.source import RowSource
from underdog.training.loop import Silent, fit, rehearse
from underdog.training.settings import TrainConfig
from underdog.training.step import FitData, Training


class StopAt(Session):
    "A session that is asked to stop after `step` steps of `training`."
    def asked(self, need=0.): return 'enough' if self.training.at.step == self.step else ''


def beginner(world, head='pair', quantization='none', family='llama', offset=False, **cfg):
    "A function that begins the same small run anew."
    from accelerate import Accelerator
    df, _ = read_rows(world/'train.csv')
    df = df.iloc[:40]
    prompter = Prompter(PromptConfig(max_length=96, min_keep=4), str(world/family), head)
    tokens, y = tokenize_rows(df, prompter, cache_folder()), labels_of(df, LMSYS)
    cfg = TrainConfig(**dict(batch_rows=8, batch_tokens=256, lr=1e-2, head_lr=1e-2, evaluations=2) | cfg)
    def begin():
        model = load_model(ModelConfig(str(world/family), head=head, quantization=quantization, rank=4, dropout=.1))
        data = FitData(RowSource(tokens, prompter, model.packing), y, np.log(np.full((40, 3), 1/3)) if offset else None, np.arange(32), np.arange(32, 40))
        return Training(model, data, cfg, Accelerator(cpu=True))
    return begin


class Losses(Silent):
    "Keeps the loss of every step."
    def __init__(self, save=lambda: None): self.losses, self.save = {}, save
    def log(self, step, loss, **_): self.losses[step] = loss


class Watched(Silent):
    "Looks at the health of every step."
    def __init__(self): self.look = Health().look


@pytest.mark.parametrize('options', [dict(offset=True), dict(head='joint', orders='both'), dict(head='joint', orders='random', family='bert', epochs=1.5), dict(quantization='nf4', head='symmetric')],
                         ids=['pair', 'both orders', 'random orders, padded', 'nf4'])
def test_resume_is_bit_equal_at_every_step(world, tmp_path, options):
    "Stopped after any step and gone on with in a new model that knows only the checkpoint, a run has the losses, weights and moments of one that was not stopped: packed, accumulated, with dropout."
    begin, recorder = beginner(world, **options), Losses()
    whole, losses = begin(), recorder.losses
    fit(whole, recorder)
    assert len(losses) == len(whole.plan) >= 4
    for stop in range(len(whole.plan)):
        first, kept = begin(), Checkpoints(tmp_path/str(stop))
        recorder = Losses(lambda: kept.save(first.at.step, first.state()))
        session = StopAt()
        session.training, session.step = first, stop
        assert fit(first, recorder, session) == 'enough'
        second = begin()
        rehearse(second)   # leaves no trace
        second.load(kept.load())
        assert second.at.step == stop and fit(second, recorder) == ''
        assert recorder.losses == losses
        for name, p in whole.trained().items(): assert torch.equal(p, second.trained()[name]), (stop, name)
        for a, b in zip(whole.optimizer.state_dict()['state'].values(), second.optimizer.state_dict()['state'].values()): assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_rehearsal_leaves_no_trace_but_the_budget_and_finds_dead_adapters(world, monkeypatch):
    training = beginner(world)()
    before = {n: p.clone() for n, p in training.trained().items()}
    assert rehearse(training) > 0 and training.at.step == 0 and training.evaluation_s > 0
    assert all(torch.equal(p, before[n]) for n, p in training.trained().items()) and not training.optimizer.state_dict()['state']
    forward = training.model.forward
    monkeypatch.setattr(training.model, 'forward', lambda batch: forward(batch).detach() + training.model.head.score.weight.sum())   # only the head is reached
    with pytest.raises(Unhealthy, match='adapters get no gradient'): rehearse(training)


def command(world, out, *more):
    "A process that trains as `small_run` does."
    code = ('import sys; sys.path[:0] = [sys.argv[1]]; from pathlib import Path; from fixtures import small_run; from underdog.core import UserError\n'
            'try: small_run(Path(sys.argv[2]), sys.argv[3], epochs=float(sys.argv[4]), session=dict(save_minutes=float(sys.argv[5])))\n'
            'except UserError as e: print(e); sys.exit(3)')
    return subprocess.Popen([sys.executable, '-c', code, os.path.dirname(__file__), str(world), str(out), *map(str, more)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(run, step, process):
    "Wait until the run has made `step` steps."
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        try:
            if read_json(run/'status.json')['step'] >= step: return
        except UserError: pass
        time.sleep(.02)
    assert process.poll() is None, process.stdout.read()


def weights(run): return {f.name: f.read_bytes() for f in sorted((run/'adapter').glob('*.safetensors'))}


@pytest.fixture(scope='session')
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'run'
    assert command(world, out, 6, 15).wait(300) == 0
    return out


def check_same(run, other):
    "Weights, held-out predictions and every logged loss are those of the other run; nothing half-written lies about."
    assert RunFolder(run).status['state'] == 'finished' and weights(run) == weights(other)
    pd.testing.assert_frame_equal(pd.read_parquet(run/'oof.parquet'), pd.read_parquet(other/'oof.parquet'))
    columns = ['step', 'loss', 'grad_norm', 'eval_loss']
    pd.testing.assert_frame_equal(RunFolder(run).metrics()[columns], RunFolder(other).metrics()[columns])
    assert not list(run.rglob('.*.tmp'))


def test_sigterm_pauses_and_sigkill_loses_only_what_was_not_saved(world, uninterrupted, tmp_path):
    "SIGTERM: saved, paused, exit 0. SIGKILL of everything: the last checkpoint. Then the run is that of the uninterrupted one."
    import psutil
    run = tmp_path/'run'
    process = command(world, run, 6, 15)
    until(run, 3, process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    status = RunFolder(run).status
    assert process.returncode == 0 and status['state'] == 'paused' and 3 <= status['step'] < 30 and 'stopped on request' in out
    assert Checkpoints(run/'checkpoint').steps()[0] == status['step']
    process = command(world, run, 6, 1e-4)   # saves after every step
    until(run, status['step'] + 3, process)
    for p in [*psutil.Process(process.pid).children(recursive=True), process]: p.kill()
    process.wait()
    assert RunFolder(run).status['state'] == 'running' and len(Checkpoints(run/'checkpoint').steps()) <= 2
    process = command(world, run, 6, 15)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and 'going on after step' in out
    check_same(run, uninterrupted)
    again = command(world, run, 6, 15)
    assert 'this run is finished' in again.communicate(timeout=120)[0] and again.returncode == 0


def test_an_orphan_saves_and_ends_and_only_then_another_may_start(world, uninterrupted, tmp_path):
    "The parent alone is killed: its worker notices, saves and ends; until then the folder is refused to others."
    run = tmp_path/'run'
    process = command(world, run, 6, 15)
    until(run, 2, process)
    process.kill()
    process.wait()
    second = command(world, run, 6, 15)
    out = second.communicate(timeout=300)[0]
    if second.returncode == 3: assert 'is at work there' in out
    began = time.monotonic()
    while time.monotonic() - began < 60:
        try:
            with locked(run): break
        except UserError: time.sleep(.1)
    if second.returncode == 3: assert RunFolder(run).status['state'] == 'paused' and 'process that started it is gone' in RunFolder(run).status['reason']
    if RunFolder(run).status['state'] != 'finished': assert command(world, run, 6, 15).wait(300) == 0
    check_same(run, uninterrupted)


def test_two_writers_one_is_refused(world, tmp_path):
    with locked(tmp_path/'run'), pytest.raises(UserError, match=f'process {os.getpid()} on .* is at work there'): small_run(world, tmp_path/'run')


def test_another_session_goes_on_from_a_read_only_copy_with_other_processes(world, uninterrupted, tmp_path):
    "Paused with one process, gone on with on another machine with two: the same run but for rounding, and the log says so; the source is not touched."
    import shutil
    first = small_run(world, tmp_path/'first', epochs=6., session=dict(time_limit=1e-6))
    assert first.status['state'] == 'paused'
    shutil.move(first.path, tmp_path/'mounted')
    for f in [*(tmp_path/'mounted').rglob('*'), tmp_path/'mounted']: f.chmod(0o555 if f.is_dir() else 0o444)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'mounted').rglob('*')}
    second = small_run(world, tmp_path/'second', epochs=6., session=dict(processes=2, resume_from=str(tmp_path/'mounted')))
    assert second.status['state'] == 'finished' and 'with 2 processes instead of 1' in (second.path/'train.log').read_text()
    np.testing.assert_allclose(RunFolder(uninterrupted).metrics()['loss'].dropna(), second.metrics()['loss'].dropna(), atol=2e-4)
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path/'mounted').rglob('*')}
    for f in [*(tmp_path/'mounted').rglob('*'), tmp_path/'mounted']: f.chmod(0o755)


def test_other_settings_in_the_same_folder_are_refused_and_restart_clears(world, tmp_path):
    small_run(world, tmp_path/'run', session=dict(time_limit=1e-6))
    with pytest.raises(UserError, match=r'another run \(lr differ\)'): small_run(world, tmp_path/'run', lr=2e-2)
    with pytest.raises(UserError, match='n_folds differ'): small_run(world, tmp_path/'new', n_folds=4, session=dict(resume_from=str(tmp_path/'run')))
    assert not (tmp_path/'new').exists() or not (tmp_path/'new'/'config.json').exists()
    run = small_run(world, tmp_path/'run', lr=2e-2, session=dict(restart=True))
    assert run.status['state'] == 'finished' and 'going on' not in (run.path/'train.log').read_text().split('process(es)')[-1]


@slow
def test_restart_with_another_session_takes_nothing_of_what_was_here(world, tmp_path):
    small_run(world, tmp_path/'run', lr=2e-2)
    paused = small_run(world, tmp_path/'paused', lr=3e-2, session=dict(time_limit=1e-6))
    run = small_run(world, tmp_path/'run', lr=3e-2, session=dict(restart=True, resume_from=str(paused.path), time_limit=1e-6))
    assert run.status['state'] == 'paused' and not run.adapter.exists()   # nothing of the finished run is taken for this one's


def test_speed_settings_are_not_another_run(world):
    config = dict(train={'lr': 1., 'batch_tokens': 1}, model={'path': 'a', 'rank': 1}, template_hash='t', tokenizer_hash='t', base_hash='b', competition='c', data=dict(hash='d'))
    assert differences(config, config | dict(train={'lr': 1., 'batch_tokens': 2}, model={'path': 'b', 'rank': 1})) == []
    assert differences(config, config | dict(train={'lr': 2., 'batch_tokens': 1}, base_hash='x')) == ['base_hash', 'lr']
    seeds = lambda train, model: config | dict(train={'seed': train}, model={'seed': model})
    assert differences(seeds(0, 0), seeds(1, 0)) == ['seed'] and differences(seeds(0, 0), seeds(0, 1)) == ['model.seed']


def test_a_resumed_run_keeps_the_halved_budget_unless_another_is_asked_for(world):
    first = beginner(world)()
    first.at.budget = 100   # memory ran out at 256
    again, larger, smaller = beginner(world)(), beginner(world, batch_tokens=512)(), beginner(world)()
    again.load(first.state())
    larger.load(first.state())
    smaller.at.budget = 50   # what the rehearsal found on a smaller card
    smaller.load(first.state())
    assert (again.at.budget, larger.at.budget, smaller.at.budget) == (100, 512, 50)


# ---- checkpoints
def states(tmp_path, *steps):
    kept = Checkpoints(tmp_path/'checkpoint')
    for s in steps: assert kept.save(s, dict(step=s, w=torch.full((500,), float(s))))
    return kept


@pytest.mark.parametrize('position', range(0, 100, 9))
def test_a_flipped_bit_or_a_lost_end_is_found_wherever_it_is(tmp_path, capsys, position):
    kept = states(tmp_path, 1, 2)
    file = kept._file(2)
    whole = file.read_bytes()
    at = len(whole)*position//100
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
    assert kept.load()['step'] == 1 and f'{file}: broken' in capsys.readouterr().out
    file.write_bytes(whole[:at])
    assert kept.load()['step'] == 1
    file.write_bytes(whole)
    assert kept.load()['step'] == 2
    file.with_suffix('.json').write_text('{"step": 2')
    assert kept.load()['step'] == 1


def test_a_full_disk_costs_the_older_checkpoint_then_this_one_but_never_the_newest(tmp_path, monkeypatch, capsys):
    kept, save = states(tmp_path, 1, 2), torch.save
    monkeypatch.setattr(torch, 'save', lambda state, path: (path.write_bytes(b'half'), (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full'))))
    assert kept.save(3, dict(step=3)) is False
    assert kept.steps() == [2] and kept.load()['step'] == 2 and 'the disk is full, step 3 was not saved' in capsys.readouterr().out
    assert not list(kept.folder.glob('.*'))
    calls = []
    def once(state, path):
        calls.append(path)
        if len(calls) == 1: raise OSError(errno.ENOSPC, 'full')
        save(state, path)
    monkeypatch.setattr(torch, 'save', save)
    kept.save(4, dict(step=4))
    monkeypatch.setattr(torch, 'save', once)
    assert kept.save(5, dict(step=5)) is True and kept.steps() == [5, 4] and len(calls) == 2


def test_a_really_full_disk(tmp_path):
    "Checkpoints on a file system of 64 kB: what does not fit is said and costs nothing that was safe."
    small = tmp_path/'small'
    small.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', small], capture_output=True).returncode: pytest.skip('no right to mount a small file system')
    try:
        kept = Checkpoints(small/'checkpoint')
        assert kept.save(1, dict(step=1, w=torch.zeros(4000)))
        assert kept.save(2, dict(step=2, w=torch.zeros(8000))) is False or kept.steps()[0] == 2
        assert kept.save(3, dict(step=3, w=torch.zeros(40000))) is False
        assert kept.load()['step'] in (1, 2) and not list(kept.folder.glob('.*'))
        with pytest.raises(UserError, match='free some space'): kept.check_room(1e6)
    finally: subprocess.run(['umount', small], check=True)


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    (tmp_path/'.adapter.tmp').mkdir()
    (tmp_path/'.adapter.tmp'/'x').touch()
    for name in ('.a.json.abc.tmp', 'keep.tmp', '.lock'): (tmp_path/name).touch()
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'keep.tmp']


# ---- clock
def test_the_clock_is_not_moved_by_the_wall_clock(monkeypatch):
    clock, session = Clock.hours(1), Session(Clock.hours(1), save_every=60)
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, 'time', lambda: jump)
        assert 3590 < clock.left <= 3600 and session.asked() == '' and not session.save_due()
    assert Session(Clock.hours(1)).asked(need=3599.5) == 'stopped by the time limit'
    for bad in (-2, float('nan'), float('inf')):
        with pytest.raises(UserError, match='time_limit'): Clock.hours(bad)


def test_a_run_stops_before_its_limit_with_a_checkpoint(world, uninterrupted, tmp_path):
    "With a limit in the midst of the run it is paused in time, and sessions add up to the uninterrupted run."
    run, limit = tmp_path/'run', 8 + RunFolder(uninterrupted).status['elapsed_s']/2
    small_run(world, run, epochs=6., session=dict(time_limit=limit/3600))
    state = RunFolder(run).status
    if state['state'] == 'paused':
        assert state['reason'] == 'stopped by the time limit'
        small_run(world, run, epochs=6.)
    check_same(run, uninterrupted)


# ---- health
def test_a_run_that_cannot_come_to_anything_ends_early_and_goes_on_with_a_lower_rate(world, tmp_path):
    "A learning rate far too high: ended with cause and remedy long before the last step; the same run goes on from its last checkpoint when a person lowers the rate."
    with pytest.raises(UserError, match='lr') as e: small_run(world, tmp_path/'run', epochs=40., lr=30., head_lr=30., start='none', session=dict(save_minutes=1e-4))
    run = RunFolder(tmp_path/'run')
    assert run.status['state'] == 'failed' and run.status['step'] < 150 < run.status['of'] and ('third' in str(e.value) or 'by three' in str(e.value))
    assert Checkpoints(run.checkpoint).steps()
    mended = small_run(world, tmp_path/'mended', epochs=40., lr=1e-4, head_lr=1e-4, start='none', session=dict(resume_from=str(run.path), time_limit=1e-6))
    assert mended.status['state'] == 'paused' and mended.status['step'] > 0 and mended.config['train']['lr'] == 1e-4


def test_a_step_that_is_not_finite_is_left_out(world, monkeypatch):
    "One poisoned step changes no weight; three in a row end the run."
    training = beginner(world, epochs=3.)()
    training.step()
    before, y = {n: p.clone() for n, p in training.trained().items()}, training.y.clone()
    training.y[:] = float('nan')
    assert training.step()['skipped'] and all(torch.equal(p, before[n]) for n, p in training.trained().items())
    with pytest.raises(Unhealthy, match='not a number in three steps'): fit(training, Watched())
    training.y[:] = y
    assert all(p.isfinite().all() for p in training.trained().values())


def test_the_head_alone_can_be_trained(world, tmp_path):
    "Rank 0 has no adapters, and that is no fault."
    from accelerate import Accelerator
    base = beginner(world)()
    model = load_model(ModelConfig(str(world/'llama'), rank=0, quantization='none'))
    training = Training(model, base.data, base.cfg, Accelerator(cpu=True))
    rehearse(training)
    assert fit(training, Watched()) == ''
