"""Jobs in forked children of a process that has imported everything: each costs what it does, not its imports.

What the library starts as `python -m module` is forked, too; a kernel's cells run in the process that asks for them.
The watching process takes in orphans, so that none can hide."""
import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

TRACEBACK = 70   # exit code of a child that ended with one


def load_everything():
    "Import what the jobs need, without starting a thread: a process with threads is not to be forked."
    os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
    import accelerate, bitsandbytes, datasets, nbformat, optuna, papermill, peft, sklearn.linear_model, torch  # noqa: F401,E401
    import underdog.console.demo, underdog.console.main, underdog.inference.scored  # noqa: F401,E401
    import underdog.search.trials, underdog.training.run, underdog.training.worker  # noqa: F401,E401
    from transformers import LlamaModel, PreTrainedTokenizerFast  # noqa: F401

    from underdog.machine import quiet
    quiet()
    torch.set_num_threads(1)
    # PR_SET_CHILD_SUBREAPER: whoever loses its parent becomes ours
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL(None).prctl(36, 1)


# ---- what a child does otherwise than a process that was started
class Forked:
    "What the library uses of `subprocess.Popen`, for `python -m module args`: a fork that runs the module."
    def __init__(self, command, stdout=None, env=None, pass_fds=(), start_new_session=False, **_):
        at = command.index('-m')
        self.returncode, self.pid = None, os.fork()
        if self.pid: return
        def work():
            if start_new_session: os.setsid()
            if env: _replace_environment(env)
            _begin(stdout.fileno())
            sys.argv = command[at + 1:]
            runpy.run_module(command[at + 1], run_name='__main__', alter_sys=True)
        _end(work)

    def poll(self): return self._wait(os.WNOHANG)

    def _wait(self, how=0):
        if self.returncode is not None: return self.returncode
        try: pid, status = os.waitpid(self.pid, how)
        except ChildProcessError: pid, status = self.pid, 0
        if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (3600. if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end: raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def terminate(self): self.send_signal(signal.SIGTERM)

    def kill(self): self.send_signal(signal.SIGKILL)


def _replace_environment(env):
    os.environ.clear()
    os.environ.update(env)


def _begin(log):
    "Output into the descriptor `log`, signals as at the start of a process."
    for number in (signal.SIGTERM, signal.SIGPIPE): signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)   # as Python has it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for n in (1, 2): os.dup2(log, n)
    sys.stdout, sys.stderr = (open(n, 'w', buffering=1, closefd=False, errors='replace') for n in (1, 2))


def _end(work):
    "Do `work`, whatever becomes of it end the process: with the exit code that the console would give it."
    code = TRACEBACK
    try:
        work()
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt: code = 130
    except BaseException as e:
        from underdog.core import UserError, disk_full
        known = isinstance(e, (UserError, OSError)) or disk_full(e)
        with contextlib.suppress(OSError, ValueError): print(f'underdog: {e}') if known else traceback.print_exc()
        code = 1 if known else TRACEBACK
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError): stream.flush()
        os._exit(code)


def fork_instead():
    "From here on this process, a child, forks where the library would start a process of its own."
    import multiprocessing

    import papermill

    from underdog import process
    from underdog.search import trials
    fork = multiprocessing.get_context('fork')
    multiprocessing.get_context = lambda method=None: fork
    names = dict(vars(subprocess), Popen=Forked)
    process.subprocess = trials.subprocess = type('Subprocess', (), {k: v for k, v in names.items() if k[0] != '_'})
    papermill.execute_notebook = execute_here


def execute_here(path, target, values, **_):
    "The cells of a notebook, in this process; what papermill does in one of its own."
    import nbformat
    braces = lambda text: text.replace('{{', '{').replace('}}', '}')
    notebook, scope = nbformat.read(braces(path), 4), {'__name__': 'kernel'}
    nbformat.write(notebook, braces(target))
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        lines = [line for line in cell.source.splitlines() if not line.startswith('%')]
        exec(compile('\n'.join(lines), str(path), 'exec'), scope)
        if 'parameters' in cell.metadata.get('tags', []): scope.update(values)


# ---- the watching side
class Ended(NamedTuple):
    "How a job ended."
    code: int | None   # exit code; None: it was still at work when its time was up
    text: str          # what it wrote

    @property
    def traceback(self): return self.code == TRACEBACK or 'Traceback (most recent call last)' in self.text


class Job(Forked):
    "A function in a forked child, in a session of its own, with its output in the file `log`."
    def __init__(self, work, log):
        self.log = Path(log)
        self.returncode, self.pid = None, os.fork()
        if self.pid: return
        def begin():
            os.setsid()
            _begin(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            fork_instead()
            work()
        _end(begin)

    def end(self, limit_s):
        "Wait for it; what is not over after `limit_s` is killed, with all that it started."
        try: code = self.wait(limit_s)
        except subprocess.TimeoutExpired:
            sweep()
            self.wait(10)
            code = None
        return Ended(code, self.log.read_text(errors='replace'))


def do(work, log, limit_s=10.):
    "`work()` in a child; how that `Ended`."
    return Job(work, log).end(limit_s)


KEPT = set()   # processes that are no part of any job


def descendants():
    "The living processes that this one, or one of its children, has started."
    import psutil
    living = []
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            ours = KEPT & {p.pid, *(q.pid for q in p.parents())}
            if not ours and p.status() != psutil.STATUS_ZOMBIE: living.append(p)
    return living


def bury():
    "Take the exit codes of orphans that have ended."
    import psutil
    for p in psutil.Process().children():
        if p.pid in KEPT: continue
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if p.status() == psutil.STATUS_ZOMBIE: os.waitpid(p.pid, os.WNOHANG)


def sweep():
    "Kill whatever is left."
    import psutil
    for p in descendants():
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    bury()


def orphans(within=10.):
    "Command and age of what still lives `within` seconds after its job has ended; killed then."
    end = time.monotonic() + within
    while (left := descendants()) and time.monotonic() < end:
        bury()
        time.sleep(.05)
    names = [f'{p.pid} {p.status()}' for p in left if p.is_running()]
    sweep()
    return names
