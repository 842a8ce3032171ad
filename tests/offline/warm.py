"""Children of the tests that begin where their imports end.

A process of this library imports torch, transformers and peft for 8 seconds of CPU, and the tests start hundreds. So a
process that starts such children keeps a server that has imported these libraries, and nothing of ours. The server
forks; the fork becomes a child of the process that asked (for a moment the reaper of orphans), with the descriptors,
folder, environment and arguments of a new process. What is not listed here is started as ever, and so is everything
with UNDERDOG_COLD."""
import ctypes
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading

# what these modules start, or are, needs the libraries anyway; a script says `# warm` in its first line
MODULES = ('underdog.training.worker', 'underdog.process', 'underdog.inference.scored', 'underdog.search.calibrate',
           'underdog.search.ceilings', 'underdog.kernels', 'torch.distributed.run', 'papermill', 'ipykernel_launcher',
           'benchmarks.gpu')
# these start nobody
LAST = ('underdog.training.worker', 'underdog.process', 'benchmarks.gpu', 'multiprocessing.spawn')
LIBRARIES = ('torch', 'torch.distributed.run', 'torch.distributed.elastic.multiprocessing.api', 'transformers',
             'transformers.modeling_utils', 'accelerate', 'bitsandbytes', 'peft', 'datasets', 'pandas',
             'pyarrow.parquet', 'sklearn.linear_model', 'papermill', 'ipykernel.ipkernel')
# read by libraries at their import
AT_IMPORT = ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE', 'HF_HOME', 'HF_HUB_CACHE')
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NAME = 15
NAME = 'warm server'   # of a server, as ps shows it
FLAGS = ('-u', '-B')   # of the interpreter, which a fork can have
MOST = 1 << 20   # bytes of a request
# group, gid, groups, uid, umask and preexec_fn of a process that wants none of these
PLAIN = (-1, None, None, None, -1, None)


# ---- who asks
class Server:
    "The server of this process: made at the first request, or inherited from the server that forked this process."

    def __init__(self):
        self.owner = self.socket = None
        self._unlock()
        os.register_at_fork(after_in_child=self._unlock)   # a thread that had it is not in the fork

    def _unlock(self): self.lock = threading.Lock()

    def fork_exec(self, start, args, executables, close_fds, pass_fds, cwd, env, *rest):
        "In place of `_posixsubprocess.fork_exec`: the id of the new child."
        before = dict(env and (e.split(b'=', 1) for e in env) or os.environb)
        what = close_fds and rest[10:16] == PLAIN and _wanted([os.fsdecode(a) for a in args], before)
        if not what: return start(args, executables, close_fds, pass_fds, cwd, env, *rest)
        # the pipes of the child; where it has none of its own, those of this process
        stdin, _, _, stdout, _, stderr, errors_read, errors, _, session = rest[:10]
        descriptors = {n: (fd if fd >= 0 else n) for n, fd in enumerate((stdin, stdout, stderr))}
        descriptors |= {fd: fd for fd in pass_fds if fd != errors}
        request = dict(what=what, env=before, cwd=cwd or os.getcwd(), session=bool(session), parent=os.getpid(),
                       targets=list(descriptors))
        try:
            with self.lock: return self._ask(request, list(descriptors.values()))
        except OSError: return start(args, executables, close_fds, pass_fds, cwd, env, *rest)

    def _ask(self, request, descriptors):
        if self.owner != os.getpid(): self._begin()
        reap = ctypes.CDLL(None).prctl
        reap(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self.socket, [pickle.dumps(request)], descriptors)
            pid = int(self.socket.recv(100) or 0)
            if not pid or not self._begun(pid): raise OSError('the server is gone')
        finally: reap(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return pid

    def _begun(self, pid):
        "Wait until the child `pid` has begun, or was killed before it could say so."
        heard = lambda limit_s: select.select([self.socket], [], [], limit_s)[0]
        while not heard(.1):
            # what it said as it died is not left for the next request
            if _dead(pid) and not heard(0): return True
        return self.socket.recv(100) == b'begun'

    def _begin(self):
        self.owner = os.getpid()
        self.socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f'import warm; warm.serve({there.fileno()})'
        env = dict(os.environ, TORCHDYNAMO_DISABLE='1', PYTHONPATH=os.path.dirname(__file__))
        with there:
            self.process = subprocess.Popen([sys.executable, '-c', code], pass_fds=[there.fileno()], env=env,
                                            **dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL))


def _dead(pid):
    "Has this child ended? Its exit code is left to who waits for it."
    try: return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError: return False   # it is not yet ours


def _wanted(args, env):
    "(kind, name, flags, arguments) of a command that can be started warm, else None."
    same = all(env.get(n.encode()) == os.environb.get(n.encode()) for n in AT_IMPORT)
    if args[:1] != [sys.executable] or not same or env.get(b'OMP_NUM_THREADS') != b'1': return None
    if b'KAGGLE_LOOPBACK' in env or _brings_libraries(env): return None
    rest = list(itertools.dropwhile(FLAGS.__contains__, args[1:]))
    flags = args[1:len(args) - len(rest)]
    if rest[:1] == ['-m'] and rest[1] in MODULES: return '-m', rest[1], flags, rest[2:]
    if rest[:1] == ['-c']:
        if 'multiprocessing.spawn ' in rest[1]: return '-c', rest[1], flags, rest[2:]
        if rest[1].lstrip().startswith('# warm'): return '-c', rest[1], flags, rest[2:]
    # a script under torchrun
    if rest and rest[0].endswith('.py') and b'TORCHELASTIC_RUN_ID' in env: return '', rest[0], flags, rest[1:]


def _brings_libraries(env):
    "Is this a Kaggle kernel with wheels, to which it may owe a library that the server has imported already?"
    from pathlib import Path
    if b'UNDERDOG_TEST_KERNEL' not in env: return False
    tree = Path(os.fsdecode(env[b'UNDERDOG_KAGGLE']))
    return any((tree/'site').glob('*')) or any((tree/'input').rglob('*.whl'))


SERVER = Server()


# ---- who answers
def serve(number):
    "Import the libraries, then fork for each request that comes from the socket `number`."
    prepare(LIBRARIES)
    _answer(socket.socket(fileno=number))


def prepare(libraries):
    "Import what the forks of this process shall find."
    import gc
    import importlib
    for name in libraries: importlib.import_module(name)
    gc.collect()
    gc.freeze()   # pages that are not written are shared
    # threads do not survive a fork; the allocator of pyarrow knows how to start its own again
    threads = [open(f'/proc/self/task/{n}/comm').read().strip() for n in os.listdir('/proc/self/task')]
    if len(threads) - threads.count('jemalloc_bg_thd') > 1: sys.exit(f'threads: {threads}')


def _answer(requests):
    _call_itself(NAME)
    while True:
        payload, descriptors, _, _ = socket.recv_fds(requests, MOST, 100)
        if not payload: os._exit(0)
        between = os.fork()
        if not between:
            between, code = os.getpid(), 1
            try:
                child = os.fork()
                if child: requests.send(str(child).encode())
                else: _become(pickle.loads(payload), descriptors, requests, between)
                code = 0
            finally: os._exit(code)
        os.waitpid(between, 0)
        for fd in descriptors: os.close(fd)


def _become(request, descriptors, requests, between):
    "Turn this fork, a child of `between`, into the process that was asked for; never returns."
    import time
    import traceback
    _call_itself('python')
    while os.getppid() == between: time.sleep(.001)
    if os.getppid() != request['parent']: os._exit(1)   # who asked has died
    kind, name, flags, arguments = request['what']
    if request['session']: os.setsid()
    requests.send(b'begun')
    code = 1
    try:
        _take(descriptors, request['targets'])
        module = name if kind == '-m' else 'multiprocessing.spawn' if 'multiprocessing.spawn ' in name else ''
        if module not in LAST: have_a_server()
        _environment(request['env'], request['cwd'])
        streams('-u' in flags)
        sys.dont_write_bytecode |= '-B' in flags
        code = _run(kind, name, arguments)
    except BaseException: os.write(2, traceback.format_exc().encode())
    finally: os._exit(code)


def _call_itself(name): ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def _take(descriptors, targets):
    "Have `descriptors` under the numbers `targets`, and no others."
    import fcntl
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in descriptors]
    os.closerange(0, 500)
    for fd, target in zip(high, targets): os.dup2(fd, target)
    os.closerange(500, 1100)


def have_a_server():
    "This process may start others: it keeps a fork of itself as it is now, when only libraries are imported."
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        for n in (0, 1, 2): os.dup2(os.open(os.devnull, os.O_RDWR), n)
        number = there.detach()
        os.closerange(3, number)
        os.closerange(number + 1, 1100)
        _answer(socket.socket(fileno=number))
    there.close()
    SERVER.owner, SERVER.socket = os.getpid(), here


def _environment(env, cwd):
    import random
    import tempfile
    import numpy
    os.environb.clear()
    os.environb.update(env)
    os.chdir(cwd)
    # the libraries of the venv stay where they are
    ours = os.path.dirname(__file__)
    rest = sys.path[sys.path.index(ours) + 1:]
    sys.path[:] = [p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p] + rest
    if 'UNDERDOG_TEST_KERNEL' in os.environ: sys.modules['sitecustomize']._hide_checkout(os.environ['UNDERDOG_KAGGLE'])
    sys.path_importer_cache.clear()
    tempfile.tempdir = None
    random.seed()
    numpy.random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def streams(unbuffered):
    for n, name in ((1, 'stdout'), (2, 'stderr')):
        stream = open(n, 'w', buffering=1, closefd=False, encoding='utf-8', errors='backslashreplace')
        if unbuffered: stream.reconfigure(write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f'__{name}__', stream)
    sys.stdin = sys.__stdin__ = open(0, closefd=False, encoding='utf-8')


def _run(kind, name, arguments):
    "Run as __main__, then what the interpreter does at its end; returns the exit code."
    import runpy
    import types
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    main.__builtins__ = __builtins__
    sys.argv[:] = [name if kind == '' else kind, *arguments]
    code = 0
    try:
        if kind == '-m':
            sys.path.insert(0, os.getcwd())
            runpy._run_module_as_main(name)
        elif kind == '-c':
            sys.path.insert(0, '')
            exec(compile(name, '<string>', 'exec'), main.__dict__)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
            main.__file__ = name
            with open(name) as f: source = f.read()
            exec(compile(source, name, 'exec'), main.__dict__)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, int | None): print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    end()
    return code & 0xff


def end():
    "What the interpreter does at its end."
    import atexit
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try: stream.flush()
        except (OSError, ValueError): pass
