"A child that begins early is as any other, and nobody sees one that gets no work: laws of `standby`."
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from fixtures import small_run

from underdog.core import UserError
from underdog.process import Standby, launch, standby
from underdog.session import SessionConfig, locked
from underdog.training import run as run_module

ONE = SessionConfig(processes=1)
SAYS = """
import os, sys
print(sys.argv[1:], os.environ['UNDERDOG_PARENT'], __name__)
print(sys.stdin.read() == '', file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    "Makes a module of a source text, for children alone."
    monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)

    def make(source, name='says_what_it_sees'):
        (tmp_path/f'{name}.py').write_text(source)
        return name
    return make


def gone(process):
    "Does the process end within a minute?"
    began = time.monotonic()
    while time.monotonic() - began < 60:
        try:
            if psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE: return True
        except psutil.NoSuchProcess: return True
        time.sleep(.05)
    return False


def test_it_runs_what_launch_would_have_started(module, tmp_path):
    "Arguments, environment, name, stdin, log and exit code are those of a child that is started with its work."
    name = module(SAYS)
    plain = launch(name, ['a b', 3.5], tmp_path/'plain.txt', ONE)
    with standby(name, [], ONE) as worker: early = launch(worker, ['a b', 3.5], tmp_path/'early.txt', ONE)
    assert early == plain and plain[0] == 7
    assert (tmp_path/'early.txt').read_text() == (tmp_path/'plain.txt').read_text()
    assert f"['a b', '3.5'] {os.getpid()} __main__" in plain[1]


def test_what_cannot_be_imported_says_so_in_the_log(module, tmp_path):
    with standby(module('import nothing_of_that_name'), ['nor_this'], ONE) as worker:
        code, tail = launch(worker, [], tmp_path/'log.txt', ONE)
    assert code == 1 and "No module named 'nothing_of_that_name'" in tail


def test_one_that_is_gone_is_replaced(module, tmp_path):
    with standby(module(SAYS), [], ONE) as worker:
        worker.child.kill()
        worker.child.wait()
        code, tail = launch(worker, ['again'], tmp_path/'log.txt', ONE)
    assert code == 7 and "['again']" in tail


def test_the_lock_is_held_until_it_ends(module, tmp_path):
    enough = tmp_path/'enough'
    name = module(f'import time\nfrom pathlib import Path\nwhile not Path({str(enough)!r}).exists(): time.sleep(.05)')
    with standby(name, [], ONE) as worker:
        with locked(tmp_path/'run') as lock, open(tmp_path/'log.txt', 'ab') as log:
            child = worker.told([], log, (lock,))
        with pytest.raises(UserError, match='is at work there'):
            with locked(tmp_path/'run'): pass
        enough.touch()
        assert child.wait(60) == 0
        with locked(tmp_path/'run'): pass


def test_one_without_work_ends_with_its_parent(module, tmp_path):
    "Whatever happens to the parent: it returns, it fails, it is killed."
    with standby(module(SAYS), [], ONE) as worker: pass
    assert worker.child.returncode
    with pytest.raises(UserError), standby(module(SAYS), [], ONE) as worker: raise UserError('not this file')
    assert worker.child.returncode
    code = ("import sys, time\nfrom underdog.process import standby\nfrom underdog.session import SessionConfig\n"
            "with standby('says_what_it_sees', [], SessionConfig(processes=1)) as worker:\n"
            "    print(worker.child.pid, flush=True)\n    time.sleep(600)")
    env = dict(os.environ, UNDERDOG_COLD='1')
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=env)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert gone(child)


def test_torchrun_starts_its_own():
    with standby('calendar', [], SessionConfig(processes=2)) as worker: assert worker == 'calendar'


def test_only_a_large_file_has_an_early_worker(world, tmp_path, monkeypatch):
    "And where training is refused it leaves neither a process nor a file."
    path = tmp_path/'train.csv'
    path.write_text('id,prompt\n1,"[""why?""]"\n')
    with run_module._worker(path, ONE) as worker: assert worker == 'underdog.training.worker'
    with run_module._worker(tmp_path/'none.csv', ONE) as worker: assert worker == 'underdog.training.worker'
    begun = []

    @contextmanager
    def seen(*args):
        with standby(*args) as worker:
            begun.append(worker)
            yield worker
    monkeypatch.setattr(run_module, '_LARGE', 0)
    monkeypatch.setattr(run_module, 'standby', seen)
    # a file that is none of ours, and a folder in which another is at work
    with pytest.raises(UserError, match='no column'): small_run(tmp_path, tmp_path/'run')
    assert not (tmp_path/'run').exists()
    with locked(tmp_path/'run'), pytest.raises(UserError, match='at work there'): small_run(world, tmp_path/'run')
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock']
    assert len(begun) == 2 and all(isinstance(w, Standby) and w.child.returncode for w in begun)
