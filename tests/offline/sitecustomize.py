"""First on PYTHONPATH of every process the tests start: no name but this machine's is resolved, no other machine is reached.

In a process that stands for a Kaggle kernel (UNDERDOG_TEST_KERNEL) the checkout's library is hidden, too: only what was uploaded may be imported. With KAGGLE_LOOPBACK Kaggle's client talks to that address."""
import os
import sys

LOCAL = ('', 'localhost', '127.0.0.1', '::1', '0.0.0.0', '::')


def _own():
    import socket
    return socket.gethostname()


def _audit(event, args):
    if event in ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr'): host = args[0]
    elif event in ('socket.connect', 'socket.sendto') and isinstance(args[1], tuple): host = args[1][0]
    else: return
    host = host.decode() if isinstance(host, bytes) else host
    if host is not None and host not in LOCAL and not host.startswith('127.') and host != _own(): raise OSError(f'a test wants to reach {host}')


sys.addaudithook(_audit)
if os.environ.get('UNDERDOG_TEST_KERNEL'):
    sys.path[:] = [p for p in sys.path if p.startswith(os.environ['UNDERDOG_KAGGLE']) or not os.path.isfile(os.path.join(p, 'underdog', 'core.py'))]
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__') and not getattr(f, '__name__', '').startswith('_Editable')]
if os.environ.get('KAGGLE_LOOPBACK') and os.path.basename(sys.argv[0] if getattr(sys, 'argv', None) else '') != 'pip':
    try: import kagglesdk.kaggle_env as _env
    except ImportError: pass
    else: _env._env_to_endpoint[_env.KaggleEnv.LOCAL] = os.environ['KAGGLE_LOOPBACK']
