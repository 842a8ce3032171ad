"Interrupted is uninterrupted: bit-equal resume at every step, kills, signals, two writers, time limits, sick runs."
import os
import shutil
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

from underdog.core import UserError, read_json
from underdog.machine import cache_folder
from underdog.session import Clock, Session, locked
from underdog.runfolder import RunFolder
from underdog.data.competition import LMSYS
from underdog.data.folds import labels_of
from underdog.data.rows import read_rows
from underdog.text.prompt import PromptConfig, Prompter
from underdog.text.tokens import tokenize_rows
from underdog.text.source import RowSource
from underdog.model.model import load_model
from underdog.model.settings import ModelConfig
from underdog.training.checkpoint import Checkpoints
from underdog.training.health import Health, Unhealthy
from underdog.training.loop import Silent, fit, rehearse
from underdog.training.prepare import describe, differences, find_earlier, prepare
from underdog.training.settings import TrainConfig
from underdog.training.step import FitData, Training


class StopAt(Session):
    "A session that is asked to stop after `step` steps of `training`."
    def __init__(self, training, step):
        super().__init__()
        self.training, self.step = training, step

    def asked(self, need=0.): return 'enough' if self.training.at.step == self.step else ''


def beginner(world, head='pair', quantization='none', family='llama', offset=False, **cfg):
    "A function that begins the same small run anew."
    from accelerate import Accelerator
    # 40 rows, the last 8 held out
    df, _ = read_rows(world/'train.csv')
    df = df.iloc[:40]
    prompter = Prompter(PromptConfig(max_length=96, min_keep=4), str(world/family), head)
    tokens, y = tokenize_rows(df, prompter, cache_folder()), labels_of(df, LMSYS)
    known = np.log(np.full((40, 3), 1/3)) if offset else None
    cfg = TrainConfig(**dict(batch_rows=8, batch_tokens=256, lr=1e-2, head_lr=1e-2, evaluations=2) | cfg)

    def begin():
        model = load_model(ModelConfig(str(world/family), head=head, quantization=quantization, rank=4, dropout=.1))
        source = RowSource(tokens, prompter, model.packing)
        data = FitData(source, y, known, train=np.arange(32), held=np.arange(32, 40))
        return Training(model, data, cfg, Accelerator(cpu=True))
    return begin


class Losses(Silent):
    "Keeps the loss of every step."
    def __init__(self, save=lambda: None): self.losses, self.save = {}, save
    def log(self, step, loss, **_): self.losses[step] = loss


class Watched(Silent):
    "Looks at the health of every step."
    def __init__(self): self.look = Health().look


def same_moments(one, other):
    "Are the moments of two optimizers equal to the last bit?"
    pairs = zip(one.state_dict()['state'].values(), other.state_dict()['state'].values())
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def check_resume(begin, folder, stops=None):
    "Stopped after each of the steps `stops` (all), a run that `begin` begins goes on as one that was not stopped."
    # not stopped
    whole, recorder = begin(), Losses()
    losses = recorder.losses
    fit(whole, recorder)
    assert len(losses) == len(whole.plan) >= 4
    for stop in stops or range(len(whole.plan)):
        # stopped
        first, kept = begin(), Checkpoints(folder/str(stop))
        recorder = Losses(lambda: kept.save(first.at.step, first.state()))
        assert fit(first, recorder, StopAt(first, stop)) == 'enough'
        # gone on with; the rehearsal leaves no trace
        second = begin()
        rehearse(second)
        second.load(kept.load())
        assert second.at.step == stop and fit(second, recorder) == ''
        # the same
        assert recorder.losses == losses
        for name, p in whole.trained().items(): assert torch.equal(p, second.trained()[name]), (stop, name)
        assert same_moments(whole.optimizer, second.optimizer)


KINDS = {
    'pair': dict(offset=True),
    'both orders': dict(head='joint', orders='both'),
    'random orders, padded': dict(head='joint', orders='random', family='bert', epochs=1.5),
    'nf4': dict(quantization='nf4', head='symmetric'),
}


@pytest.mark.parametrize('options', KINDS.values(), ids=KINDS)
def test_resume_is_bit_equal_at_every_step(world, tmp_path, options):
    """Stopped after any step and gone on with in a new model that knows only the checkpoint, a run has the losses,
    weights and moments of one that was not stopped: packed, accumulated, with dropout."""
    check_resume(beginner(world, **options), tmp_path)


def test_a_rehearsal_leaves_no_trace_but_the_budget_and_finds_dead_adapters(world, monkeypatch):
    training = beginner(world)()
    before = {n: p.clone() for n, p in training.trained().items()}
    assert rehearse(training) > 0 and training.at.step == 0 and training.evaluation_pace > 0
    assert all(torch.equal(p, before[n]) for n, p in training.trained().items())
    assert not training.optimizer.state_dict()['state']
    # a forward pass whose gradients reach the head alone
    forward, weight = training.model.forward, training.model.head.score.weight
    monkeypatch.setattr(training.model, 'forward', lambda batch: forward(batch).detach() + weight.sum())
    with pytest.raises(Unhealthy, match='adapters get no gradient'): rehearse(training)


# ---- real processes
SMALL_RUN = """# warm
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fixtures import small_run
from underdog.core import UserError
from underdog.training import run
if sys.argv[5:]: run._LARGE = 0   # so that the worker begins before the rows are read
try: small_run(Path(sys.argv[2]), sys.argv[3], epochs=6., session=dict(save_minutes=float(sys.argv[4])))
except UserError as e:
    print(e)
    sys.exit(3)
"""


def command(world, out, save_minutes=15, early=False):
    """A process that trains as `small_run` does, for six epochs; exit code 3 where the folder is refused.

    `early`: its worker begins as early as that of a large file."""
    arguments = [os.path.dirname(__file__), world, out, save_minutes] + ['early']*early
    return subprocess.Popen([sys.executable, '-c', SMALL_RUN, *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(run, step, process):
    "Wait until the run in the folder `run` has made `step` steps."
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        try:
            if read_json(RunFolder(run).status_file)['step'] >= step: return
        except UserError: pass
        time.sleep(.02)
    assert process.poll() is None, process.stdout.read()


def weights(run): return {f.name: f.read_bytes() for f in sorted(run.adapter.glob('*.safetensors'))}


@pytest.fixture(scope='session')
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'run'
    assert command(world, out).wait(300) == 0
    return out


def check_same(run, other):
    "Weights, held-out predictions and every logged loss are those of the other run; nothing half-written lies about."
    run, other = RunFolder(run), RunFolder(other)
    assert run.status['state'] == 'finished' and weights(run) == weights(other)
    pd.testing.assert_frame_equal(run.oof(), other.oof())
    columns = ['step', 'loss', 'grad_norm', 'eval_loss']
    pd.testing.assert_frame_equal(run.metrics()[columns], other.metrics()[columns])
    assert not list(run.path.rglob('.*.tmp'))


def test_sigterm_pauses_and_sigkill_loses_only_what_was_not_saved(world, uninterrupted, tmp_path):
    """SIGTERM: saved, paused, exit 0. SIGKILL of everything: the last checkpoint. Then the run is that of the
    uninterrupted one."""
    import psutil
    run, kept = tmp_path/'run', Checkpoints(tmp_path/'run'/'checkpoint')
    # SIGTERM
    process = command(world, run)
    until(run, 3, process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    status = RunFolder(run).status
    assert process.returncode == 0 and 'stopped on request' in out
    assert status['state'] == 'paused' and 3 <= status['step'] < 30
    assert kept.steps()[0] == status['step']
    # SIGKILL
    process = command(world, run, save_minutes=1e-4)   # saves after every step
    until(run, status['step'] + 3, process)
    for p in [*psutil.Process(process.pid).children(recursive=True), process]: p.kill()
    process.wait()
    assert RunFolder(run).status['state'] == 'running' and len(kept.steps()) <= 2
    # to its end
    process = command(world, run)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and 'going on after step' in out
    check_same(run, uninterrupted)
    again = command(world, run)
    assert 'this run is finished' in again.communicate(timeout=120)[0] and again.returncode == 0


@pytest.mark.parametrize('early', [True, pytest.param(False, marks=slow)])
def test_an_orphan_saves_and_ends_and_only_then_another_may_start(early, world, uninterrupted, tmp_path):
    "The parent alone is killed: its worker notices, saves and ends; until then the folder is refused to others."
    run = tmp_path/'run'
    process = command(world, run, early=early)
    until(run, 2, process)
    process.kill()
    process.wait()
    # refused, unless the worker was quicker
    second = command(world, run, early=early)
    out = second.communicate(timeout=300)[0]
    refused = second.returncode == 3
    if refused: assert 'is at work there' in out
    # the worker ends
    began = time.monotonic()
    while time.monotonic() - began < 60:
        try:
            with locked(run): break
        except UserError: time.sleep(.1)
    status = RunFolder(run).status
    if refused: assert status['state'] == 'paused' and 'process that started it is gone' in status['reason']
    # another goes on
    if status['state'] != 'finished': assert command(world, run, early=early).wait(300) == 0
    check_same(run, uninterrupted)


def test_two_writers_one_is_refused(world, tmp_path):
    message = f'process {os.getpid()} on .* is at work there'
    with locked(tmp_path/'run'), pytest.raises(UserError, match=message): small_run(world, tmp_path/'run')


def test_another_session_goes_on_from_a_read_only_copy_with_other_processes(world, uninterrupted, tmp_path):
    """Paused with one process, gone on with on another machine with two: the same run but for rounding, and the log
    says so; the source is not touched."""
    # paused
    first = small_run(world, tmp_path/'first', epochs=6., session=dict(time_limit=1e-6))
    assert first.status['state'] == 'paused'
    # mounted read-only
    mounted = tmp_path/'mounted'
    shutil.move(first.path, mounted)
    for f in [*mounted.rglob('*'), mounted]: f.chmod(0o555 if f.is_dir() else 0o444)
    before = {f: f.stat().st_mtime_ns for f in mounted.rglob('*')}
    # gone on with
    session = dict(processes=2, resume_from=str(mounted))
    second = small_run(world, tmp_path/'second', epochs=6., session=session)
    assert second.status['state'] == 'finished'
    assert 'with 2 processes instead of 1' in second.log_file.read_text()
    losses = [run.metrics()['loss'].dropna() for run in (RunFolder(uninterrupted), second)]
    np.testing.assert_allclose(*losses, atol=2e-3)   # equal but for rounding, which thirty steps let grow
    # not touched
    assert before == {f: f.stat().st_mtime_ns for f in mounted.rglob('*')}
    for f in [*mounted.rglob('*'), mounted]: f.chmod(0o755)


def test_other_settings_in_the_same_folder_are_refused_and_restart_clears(world, tmp_path):
    small_run(world, tmp_path/'run', session=dict(time_limit=1e-6))
    # refused
    with pytest.raises(UserError, match=r'another run \(lr differ\)'): small_run(world, tmp_path/'run', lr=2e-2)
    resume = dict(resume_from=str(tmp_path/'run'))
    with pytest.raises(UserError, match='n_folds differ'): small_run(world, tmp_path/'new', n_folds=4, session=resume)
    assert not RunFolder(tmp_path/'new').exists
    # begun anew
    run = small_run(world, tmp_path/'run', lr=2e-2, session=dict(restart=True))
    assert run.status['state'] == 'finished'
    assert 'going on' not in run.log_file.read_text().split('process(es)')[-1]


def test_other_labels_of_the_same_texts_are_another_run_and_no_cache_takes_them_for_the_same(world, tmp_path):
    table, winners = pd.read_csv(world/'train.csv'), ['winner_model_a', 'winner_model_b']
    exchanged = {winners[0]: table[winners[1]], winners[1]: table[winners[0]]}
    table.assign(**exchanged).to_csv(tmp_path/'new.csv', index=False)
    model = ModelConfig(str(world/'llama'), quantization='none', rank=4)
    old, new = (describe(file, model, cfg=TrainConfig(n_folds=3)) for file in (world/'train.csv', tmp_path/'new.csv'))
    assert old.config['data']['hash'] == new.config['data']['hash']
    assert differences(old.config, new.config) == ['labels']
    # an earlier build did not note them
    noted = old.config['data'].pop('labels')
    assert differences(old.config, new.config) == []
    old.config['data']['labels'] = noted
    # rows and baselines of both, the second ones with the first ones in the cache
    ours, theirs = (prepare(tmp_path/name, run).rows().sort_values('id') for name, run in (('a', old), ('b', new)))
    assert ours['y_a'].tolist() == theirs['y_b'].tolist() != theirs['y_a'].tolist()
    # what has learned from the one is not gone on with
    Checkpoints(RunFolder(tmp_path/'a').checkpoint).save(5, dict(step=5))
    with pytest.raises(UserError, match=r'another run \(labels differ\)'): find_earlier(tmp_path/'a', new.config)


@slow
def test_restart_with_another_session_takes_nothing_of_what_was_here(world, tmp_path):
    small_run(world, tmp_path/'run', lr=2e-2)
    paused = small_run(world, tmp_path/'paused', lr=3e-2, session=dict(time_limit=1e-6))
    session = dict(restart=True, resume_from=str(paused.path), time_limit=1e-6)
    run = small_run(world, tmp_path/'run', lr=3e-2, session=session)
    # the adapter of the finished run is not taken for this one's
    assert run.status['state'] == 'paused' and not run.trained


def test_speed_settings_are_not_another_run(world):
    config = dict(
        train={'lr': 1., 'batch_tokens': 1},
        model={'path': 'a', 'rank': 1},
        template_hash='t',
        tokenizer_hash='t',
        base_hash='b',
        competition='lmsys',
        data=dict(hash='d'),
    )
    faster = config | dict(train={'lr': 1., 'batch_tokens': 2}, model={'path': 'b', 'rank': 1})
    assert differences(config, faster) == []
    other = config | dict(train={'lr': 2., 'batch_tokens': 1}, base_hash='x')
    assert differences(config, other) == ['base_hash', 'lr']
    # a setting of the model and one of the training may have the same name
    seeds = lambda train, model: config | dict(train={'seed': train}, model={'seed': model})
    assert differences(seeds(0, 0), seeds(1, 0)) == ['seed']
    assert differences(seeds(0, 0), seeds(0, 1)) == ['model.seed']


def test_a_resumed_run_keeps_the_halved_budget_unless_another_is_asked_for(world):
    first = beginner(world)()
    first.at.budget = 100   # memory ran out at 256
    again, larger, smaller = beginner(world)(), beginner(world, batch_tokens=512)(), beginner(world)()
    again.load(first.state())
    larger.load(first.state())
    smaller.at.budget = 50   # what the rehearsal found on a smaller card
    smaller.load(first.state())
    assert (again.at.budget, larger.at.budget, smaller.at.budget) == (100, 512, 50)


# ---- clock
def test_the_clock_is_not_moved_by_the_wall_clock(monkeypatch):
    clock, session = Clock.hours(1), Session(Clock.hours(1), save_every=60)
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, 'time', lambda jump=jump: jump)
        assert 3590 < clock.left <= 3600 and session.asked() == '' and not session.save_due()
    assert Session(Clock.hours(1)).asked(need=3599.5) == 'stopped by the time limit'
    for bad in (-2, float('nan'), float('inf')):
        with pytest.raises(UserError, match='time_limit'): Clock.hours(bad)


def test_a_run_stops_before_its_limit_with_a_checkpoint(world, uninterrupted, tmp_path):
    "With a limit in the midst of the run it is paused in time, and sessions add up to the uninterrupted run."
    # half of the training, and the start-up
    limit_s = 8 + RunFolder(uninterrupted).status['elapsed_s']/2
    run = small_run(world, tmp_path/'run', epochs=6., session=dict(time_limit=limit_s/3600))
    if run.status['state'] == 'paused':
        assert run.status['reason'] == 'stopped by the time limit'
        small_run(world, run.path, epochs=6.)
    check_same(run.path, uninterrupted)


# ---- health
def test_a_diverging_run_ends_early_and_goes_on_with_a_lower_rate(world, tmp_path):
    """A learning rate far too high: ended with cause and remedy long before the last step; the same run goes on from
    its last checkpoint when a person lowers the rate."""
    settings = dict(epochs=40., start='none')
    with pytest.raises(UserError, match='lr') as error:
        small_run(world, tmp_path/'run', lr=30., head_lr=30., session=dict(save_minutes=1e-4), **settings)
    assert 'by three' in str(error.value)
    # early, with checkpoints
    run = RunFolder(tmp_path/'run')
    assert run.status['state'] == 'failed' and run.status['step'] < 150 < run.status['of']
    assert Checkpoints(run.checkpoint).steps()
    # on with a lower rate
    session = dict(resume_from=str(run.path), time_limit=1e-6)
    mended = small_run(world, tmp_path/'mended', lr=1e-4, head_lr=1e-4, session=session, **settings)
    assert mended.status['state'] == 'paused' and mended.status['step'] > 0 and mended.config['train']['lr'] == 1e-4


def test_a_step_that_is_not_finite_is_left_out(world):
    "One poisoned step changes no weight; three in a row end the run."
    training = beginner(world, epochs=3.)()
    training.step()
    # poisoned
    before, y = {n: p.clone() for n, p in training.trained().items()}, training.y.clone()
    training.y[:] = float('nan')
    assert training.step()['skipped']
    assert all(torch.equal(p, before[n]) for n, p in training.trained().items())
    with pytest.raises(Unhealthy, match='not a number in three steps'): fit(training, Watched())
    training.y[:] = y
    assert all(p.isfinite().all() for p in training.trained().values())


def test_the_head_alone_can_be_trained(world):
    "Rank 0 has no adapters, and that is no fault."
    from accelerate import Accelerator
    base = beginner(world)()
    model = load_model(ModelConfig(str(world/'llama'), rank=0, quantization='none'))
    training = Training(model, base.data, base.cfg, Accelerator(cpu=True))
    rehearse(training)
    assert fit(training, Watched()) == ''
