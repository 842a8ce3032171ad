"""Children that begin where their imports end (tests/offline/warm.py) are started, fail and die as others do.

So do notebooks (tests/notebooks.py)."""
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import notebooks
import pytest
import warm

MANY = 8
IS_WARM = '# warm\nimport sys; print("peft" in sys.modules)'


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    "Only processes with one thread for computing are started warm."
    if os.environ.get('OMP_NUM_THREADS') != '1' or os.environ.get('UNDERDOG_COLD'):
        pytest.skip('children start warm with OMP_NUM_THREADS=1 and without UNDERDOG_COLD')


def said(code, *arguments, **how):
    "What a process with this code writes."
    return subprocess.run([sys.executable, '-c', code, *arguments], check=True, text=True, capture_output=True,
                          **how).stdout.strip()


def test_threads_that_ask_at_the_same_time_have_each_its_own_child():
    code = '# warm\nimport os, sys; print(sys.argv[1], os.getppid())'
    with ThreadPoolExecutor(MANY) as pool: answers = list(pool.map(lambda n: said(code, str(n)), range(MANY)))
    assert answers == [f'{n} {os.getpid()}' for n in range(MANY)]


@pytest.mark.parametrize('how', [dict(umask=0o077), dict(preexec_fn=int), dict(process_group=0), dict(user=os.getuid()),
                                 dict(close_fds=False)], ids=lambda how: ''.join(how))
def test_what_a_fork_cannot_give_is_started_cold(how):
    assert said(IS_WARM, **how) == 'False'


def test_a_start_that_fails_is_no_success(tmp_path):
    assert said(IS_WARM) == 'True'
    result = subprocess.run([sys.executable, '-c', IS_WARM], cwd=tmp_path/'nowhere', capture_output=True, text=True)
    assert result.returncode == 1 and 'nowhere' in result.stderr and not result.stdout


def wait_for(child):
    "(id, status) of a child that has ended, else None; it is a child of ours once its first parent has ended."
    try: return os.waitpid(child, os.WNOHANG) if Path(f'/proc/{child}/stat').read_text().split()[2] == 'Z' else None
    except ChildProcessError: return None


def test_a_child_whose_asker_is_dead_ends():
    "It would wait for ever to become the child of a process that is no more; here it becomes one of the test."
    dead = subprocess.Popen(['true'])
    dead.wait()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = dict(what=('-c', 'pass', False, []), env={}, cwd='/', session=False, parent=dead.pid, targets=[])
    reap = warm.ctypes.CDLL(None).prctl
    server = os.fork()
    if not server:
        here.close()
        try: warm._answer(there)
        finally: os._exit(0)
    there.close()
    reap(warm.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        here.send(warm.pickle.dumps(request))
        child, end = int(here.recv(100)), time.monotonic() + 60
        while not (ended := wait_for(child)) and time.monotonic() < end: time.sleep(.01)
        if not ended: os.kill(child, signal.SIGKILL)
        assert ended == (child, 1 << 8)
    finally:
        reap(warm.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        here.close()
        os.waitpid(server, 0)


@pytest.mark.parametrize('last,code,text', [
    ('assert x == 1', 0, ''),
    ('assert x == 2, "it is one"', 1, 'While Executing Cell #4:'),
    ('import os; os.kill(os.getpid(), 9)', -9, '')])
def test_a_notebook_passes_fails_or_dies(tmp_path, capsys, last, code, text):
    "Cells that are not to be run are left out; what fails is told with its cell."
    file, cells = tmp_path/'lesson.ipynb', ['#| slow\n1/0', '#| eval: false\n1/0', 'x = 1', last]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), file)
    log = open(tmp_path/'log', 'w+b')
    assert notebooks.finish({notebooks.run(file, log): (file, log)}) == (code == 0)
    told = capsys.readouterr().out
    assert text in told and ('lesson.ipynb FAILED' in told) == (code != 0)
    assert not code or f'with code {code}' in told
    assert ('it is one' in told) == (code == 1)


def test_a_child_that_is_killed_before_it_begins_keeps_nobody_waiting():
    "The server does not see it; whoever asked would wait for ever."
    server, (here, there) = warm.Server(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.owner, server.socket = os.getpid(), here
    with here, there, subprocess.Popen(['sleep', '600']) as child:
        there.send(str(child.pid).encode())
        child.kill()
        assert server._ask({}, []) == child.pid and child.wait() == -signal.SIGKILL
