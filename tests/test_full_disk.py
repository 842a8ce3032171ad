"A full disk: what is only told is dropped, what is promised is one line and an honest state."
import errno
import os
import sys

import pytest
from safetensors import SafetensorError

from underdog import runfolder
from underdog.console import main as console
from underdog.core import UserError, disk_full
from underdog.process import _Lossy, run_worker
from underdog.runfolder import RunFolder
from underdog.training.settings import TrainConfig

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
needs_full = pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')


def raising(error):
    def call(*args, **kwargs): raise error
    return call


@pytest.mark.parametrize('error', [
    FULL, OSError(errno.EDQUOT, 'quota'), SafetensorError('I/O error: No space left on device (os error 28)'),
    RuntimeError('train: OSError: [Errno 28] No space left on device')])
def test_it_is_known_by_number_or_text(error): assert disk_full(error)


def test_other_errors_are_not_taken_for_it():
    assert not any(map(disk_full, [OSError(errno.EACCES, 'denied'), ValueError('full of space'), KeyError(28)]))


@pytest.mark.parametrize('state,reason', [('failed', 'the disk is full '*20), ('failed', 'x'), ('paused', '')])
def test_the_state_is_written_over_the_old_one(tmp_path, monkeypatch, state, reason):
    run = RunFolder(tmp_path)
    run.set_status('running', 12, 345, elapsed_s=67.)
    size = run.status_file.stat().st_size
    monkeypatch.setattr(runfolder, 'write_json', raising(FULL))
    run.change_status(state, reason)
    status = run.status
    assert (status['state'], status['step'], status['of']) == (state, 12, 345) and reason.startswith(status['reason'])
    assert run.status_file.stat().st_size == size
    # a state that was never written cannot be
    with pytest.raises(OSError, match='No space'): RunFolder(tmp_path/'new').set_status('running')


def test_a_line_of_metrics_is_dropped(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.log(step=1)
    monkeypatch.setattr(runfolder, 'append_line', raising(FULL))
    run.log(step=2)
    assert run.metrics()['step'].tolist() == [1]
    monkeypatch.setattr(runfolder, 'append_line', raising(PermissionError(errno.EACCES, 'denied')))
    with pytest.raises(PermissionError): run.log(step=3)


@needs_full
def test_what_a_process_prints_is_dropped():
    with open('/dev/full', 'w', buffering=1) as full:
        print('a line', file=_Lossy(full), flush=True)
        with pytest.raises(OSError, match='No space'): print('a line', file=full, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())   # so that it can be closed
    # a reader that is gone is no full disk
    out, into = os.pipe()
    os.close(out)
    with pytest.raises(BrokenPipeError), open(into, 'w') as pipe: print('a line', file=_Lossy(pipe), flush=True)


def test_a_worker_and_the_console_say_it_in_one_line(monkeypatch, capsys):
    def ended(code): raise SystemExit(code)
    monkeypatch.setattr(os, '_exit', ended)
    for stream in ('stdout', 'stderr'): monkeypatch.setattr(sys, stream, getattr(sys, stream))   # put back afterwards
    reasons = []
    with pytest.raises(SystemExit): run_worker(raising(FULL), failed=reasons.append)
    assert reasons == ['the disk is full ([Errno 28] No space left on device); free some space and start it again']
    assert 'Traceback' not in ''.join(capsys.readouterr())
    monkeypatch.setattr(console, 'app', raising(RuntimeError('train: OSError: [Errno 28] No space left on device')))
    with pytest.raises(SystemExit, match='1'): console.main()
    assert capsys.readouterr().err.startswith('underdog: train: OSError')
    monkeypatch.setattr(console, 'app', raising(RuntimeError('a fault of ours')))
    with pytest.raises(RuntimeError, match='a fault of ours'): console.main()


@pytest.mark.parametrize('name', ['lr', 'head_lr'])
def test_a_rate_at_which_nothing_learns_is_named_with_a_remedy(name):
    with pytest.raises(UserError, match=rf'^{name}=1e\+09: .*e-|^{name}=1e\+09: .*0\.00'): TrainConfig(**{name: 1e9})
    with pytest.raises(UserError, match=f'^{name}=nan: '): TrainConfig(**{name: float('nan')})
