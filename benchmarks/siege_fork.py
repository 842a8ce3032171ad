"""Jobs in forked children of a process that has imported everything: each costs what it does, not its imports.

What a job starts is forked, too, from a copy of the job before it began (tests/offline/warm.py); the cells of a kernel
run in the process that asks for them. The watching process takes in orphans, so that none can hide."""
import contextlib
import ctypes
import faulthandler
import gc
import importlib.util
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

OFFLINE = Path(__file__).resolve().parents[1]/'tests'/'offline'
TRACEBACK = 70   # exit code of a child that ended with one


def load_everything():
    "Import what the jobs need, without starting a thread: a process with threads is not to be forked."
    os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
    if str(OFFLINE) not in sys.path: sys.path.insert(0, str(OFFLINE))
    import warm  # noqa: F401
    import accelerate, bitsandbytes, datasets, nbformat, optuna, papermill, peft, sklearn.linear_model, torch  # noqa: F401,E401
    import underdog.console.demo, underdog.console.main, underdog.inference.scored  # noqa: F401,E401
    import underdog.search.trials, underdog.training.run, underdog.training.worker  # noqa: F401,E401
    from transformers import LlamaModel, PreTrainedTokenizerFast  # noqa: F401

    from underdog.machine import quiet
    quiet()
    torch.set_num_threads(1)
    # pages that no collection writes to stay shared with the forks
    gc.collect()
    gc.freeze()
    # PR_SET_CHILD_SUBREAPER: whoever loses its parent becomes ours
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL(None).prctl(36, 1)


# ---- what a job does otherwise than a process that was started
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


def start_warm():
    """From here on what this process, a child, starts is forked from a copy of it as it is now, without threads.

    A fork of one that has them may wait forever for a lock that none of its threads holds."""
    import papermill
    import warm
    papermill.execute_notebook = execute_here
    spec = importlib.util.spec_from_file_location('sitecustomize', OFFLINE/'sitecustomize.py')
    sys.modules['sitecustomize'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules['sitecustomize'])
    warm.have_a_server()


def execute_here(path, target, values, **_):
    "The cells of a notebook, in this process; what papermill does in one of its own."
    import nbformat
    braces = lambda text: text.replace('{{', '{').replace('}}', '}')
    notebook, scope = nbformat.read(braces(path), 4), {'__name__': 'kernel', 'In': []}
    nbformat.write(notebook, braces(target))
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        scope['In'].append(cell.source)
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


STILL_S = 30.   # without any work, after which a job that sleeps is taken to hang
IDLE = .05      # of the time, spent on nothing but waiting
SLOW = 20       # times its limit may pass on the clock: a busy machine makes slow, not endless


class Patience:
    """How long to wait for processes: until they have worked for `limit_s`, or for `still_s` have done next to nothing.

    Seconds of CPU: the clock says little on a machine that others use, too."""
    def __init__(self, limit_s, still_s):
        self.limit_s, self.still_s, self.before, self.spent = limit_s, still_s, None, 0.
        self.began = self.last = self.asked = time.monotonic()

    def ends(self, processes):
        "Why no longer to wait for the `processes`; '' where they may still end."
        import psutil
        spent, now, at_work = 0., time.monotonic(), False
        for p in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                spent += sum(p.cpu_times()[:4])
                at_work |= p.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        if self.before is None: self.before = spent
        # who only looks every now and then whether its parent lives does not work
        if at_work or spent - self.spent > IDLE*(now - self.asked): self.last = now
        self.spent, self.asked = spent, now
        if spent - self.before > self.limit_s: return f'{spent - self.before:.0f} s of work'
        if now - self.last > self.still_s: return f'{self.still_s:.0f} s without work'
        return f'{now - self.began:.0f} s' if now - self.began > SLOW*self.limit_s + self.still_s else ''


class Job:
    "A function in a forked child, in a session of its own, output to the file `log`; `warm`: what it starts is forked."
    def __init__(self, work, log, warm=True):
        self.log, self.returncode, self.pid = Path(log), None, os.fork()
        if self.pid: return
        def begin():
            os.setsid()
            _begin(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            faulthandler.register(signal.SIGUSR1, file=2)   # where it hangs
            if warm: start_warm()
            work()
        _end(begin)

    def poll(self):
        "Its exit code; None while it is at work."
        if self.returncode is None:
            try: pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError: pid, status = self.pid, signal.SIGKILL   # it was swept away
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self):
        if self.poll() is None: os.kill(self.pid, signal.SIGKILL)

    def end(self, limit_s):
        "Wait for it, with `Patience`; what hangs says where, and is killed with all that it started."
        patience, why, asked = Patience(limit_s, STILL_S), '', time.monotonic()
        while self.poll() is None and not why:
            time.sleep(.01)
            if time.monotonic() - asked < 1: continue
            asked = time.monotonic()
            why = patience.ends(descendants())
        if why:
            for p in descendants():
                with contextlib.suppress(ProcessLookupError): os.kill(p.pid, signal.SIGUSR1)
            time.sleep(1)
            sweep()
            while self.poll() is None: time.sleep(.01)
        return Ended(None if why else self.returncode, f'{self.log.read_text(errors="replace")}\n{why}'.strip())


def do(work, log, limit_s=10., warm=True):
    "`work()` in a child; how that `Ended`."
    return Job(work, log, warm).end(limit_s)


KEPT = set()   # processes that are no part of any job


def descendants(servers=False):
    "The living processes that this one, or one of its children, has started; those that fork for them with `servers`."
    import psutil
    import warm
    living = []
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            ours = KEPT & {p.pid, *(q.pid for q in p.parents())}
            if ours or p.status() == psutil.STATUS_ZOMBIE or (p.name() == warm.NAME and not servers): continue
            living.append(p)
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
    for p in descendants(servers=True):
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    bury()


def orphans(within=10.):
    "What still lives `within` seconds, of work or of sleep, after its job has ended; killed then."
    patience = Patience(within, within)
    while (left := descendants()) and not patience.ends(left):
        bury()
        time.sleep(.05)
    names = [f'{p.pid} {p.status()}' for p in left if p.is_running()]
    sweep()
    return names
