"""First on PYTHONPATH of every process the tests start: no name but this machine's is resolved, none other is reached.

In a process that stands for a Kaggle kernel (UNDERDOG_TEST_KERNEL) the checkout's library is hidden, too: only what was
uploaded may be imported. With KAGGLE_LOOPBACK Kaggle's client talks to that address."""
import os
import sys

LOCAL = ('', 'localhost', '127.0.0.1', '::1', '0.0.0.0', '::')
LOOKUPS = ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr')
CONNECTIONS = ('socket.connect', 'socket.sendto')


def _own():
    import socket
    return socket.gethostname()


def _audit(event, args):
    if event in LOOKUPS: host = args[0]
    elif event in CONNECTIONS and isinstance(args[1], tuple): host = args[1][0]
    else: return
    host = host.decode() if isinstance(host, bytes) else host
    if host is None or host in LOCAL or host.startswith('127.') or host == _own(): return
    raise OSError(f'a test wants to reach {host}')


sys.addaudithook(_audit)


def _hide_checkout(root):
    "Take the library of the checkout off the path, and the hook of an editable install."
    is_library = lambda folder: os.path.isfile(os.path.join(folder, 'underdog', 'core.py'))
    sys.path[:] = [p for p in sys.path if p.startswith(root) or not is_library(p)]
    is_editable = lambda finder: (getattr(finder, '__module__', '').startswith('__editable__')
                                  or getattr(finder, '__name__', '').startswith('_Editable'))
    sys.meta_path[:] = [finder for finder in sys.meta_path if not is_editable(finder)]


def _redirect_client(url):
    try: import kagglesdk.kaggle_env as env
    except ImportError: return
    env._env_to_endpoint[env.KaggleEnv.LOCAL] = url


if os.environ.get('UNDERDOG_TEST_KERNEL'): _hide_checkout(os.environ['UNDERDOG_KAGGLE'])
# pip, which runs often, has nothing to say to Kaggle
_program = os.path.basename(sys.argv[0]) if getattr(sys, 'argv', None) else ''
if os.environ.get('KAGGLE_LOOPBACK') and _program != 'pip': _redirect_client(os.environ['KAGGLE_LOOPBACK'])


def _start_warm():
    "Processes that this one starts begin where their imports end, where they can (warm.py)."
    import _posixsubprocess
    start = _posixsubprocess.fork_exec
    def fork_exec(*args):
        import warm
        return warm.SERVER.fork_exec(start, *args)
    if start.__name__ == fork_exec.__name__ and hasattr(start, '__code__'): return   # so it is already
    _posixsubprocess.fork_exec = fork_exec
    if 'subprocess' in sys.modules: sys.modules['subprocess']._fork_exec = fork_exec


if not os.environ.get('UNDERDOG_COLD'): _start_warm()
