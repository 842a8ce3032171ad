"""Every notebook runs: each in a fork of a process that has imported the libraries, and nothing of ours.

`python tests/notebooks.py [notebook ...]`; as `nbdev_test`, it leaves out cells of `#| eval: false` and of the flags
`tst_flags` in settings.ini. What fails is shown with notebook, cell and traceback, and the exit code is 1."""
import argparse
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# read at the start of a process: offline/ reaches no other machine, and children begin where their imports end
ENV = dict(PYTHONPATH=f'{ROOT}/tests/offline:{ROOT}/lib', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1',
           TOKENIZERS_PARALLELISM='false')
AT_ONCE = 2
SLOW = 4   # seconds of CPU of a notebook that is named


def run(notebook, log):
    "The id of a new process that runs the notebook and writes what it has to say to the file `log`."
    process = os.fork()
    if process: return process
    code = 1
    try:
        for n in (1, 2): os.dup2(log.fileno(), n)
        import warm
        warm.streams(unbuffered=True)
        if not os.environ.get('UNDERDOG_COLD'): warm.have_a_server()
        from nbdev.config import get_config
        from nbdev.test import test_nb
        code = int(not test_nb(notebook, skip_flags=get_config().tst_flags.split(), basepath=ROOT)[0])
        warm.end()
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def finish(running):
    "Wait for one of `running`, {id: (notebook, log)}, and tell of it; did it pass?"
    process = None
    while process not in running: process, status, used = os.wait3(0)   # orphans of tests come here, too
    notebook, log = running.pop(process)
    seconds, code = used.ru_utime + used.ru_stime, os.waitstatus_to_exitcode(status)
    with log:
        log.seek(0)
        said = log.read().decode(errors='replace')
    name = os.path.relpath(notebook, ROOT)
    if code: print(f'{name} FAILED with code {code}\n{said}', flush=True)
    elif seconds > SLOW: print(f'{name}: {seconds:.0f} s', flush=True)
    return code == 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebook', nargs='*', type=Path, help='default: all')
    return parser.parse_args()


def main():
    import warm
    from nbdev.doclinks import nbglob
    begin, named = time.monotonic(), [a.resolve() for a in arguments().notebook]
    os.chdir(ROOT/'nbs')
    sys.path.remove(str(ROOT/'tests'))   # a notebook says itself what it wants
    notebooks = named or sorted(f.absolute() for f in nbglob(as_path=True) if not (f.parent/'.notest').exists())
    warm.prepare((*warm.LIBRARIES, 'matplotlib.pyplot', 'nbdev.test'))
    assert not any(name.split('.')[0] == 'underdog' for name in sys.modules)
    running, passed = {}, []
    for notebook in notebooks:
        log = tempfile.TemporaryFile()
        running[run(notebook, log)] = notebook, log
        if len(running) == AT_ONCE: passed.append(finish(running))
    while running: passed.append(finish(running))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f'{sum(passed)} of {len(passed)} notebooks pass: {time.monotonic() - begin:.0f} s, '
          f'{sum(u.ru_utime + u.ru_stime for u in used):.0f} s of CPU')
    if not all(passed): sys.exit(1)


if __name__ == '__main__':
    if os.environ.items() >= ENV.items(): main()
    else: os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENV)
