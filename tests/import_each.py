"""Every module imports by itself, before any other of the library; exit code 1 names those that do not.

Each gets a process: a fork of one that has imported the libraries, and nothing of ours."""
import importlib
import os
import sys
import traceback
from pathlib import Path

LIBRARY = Path(__file__).parents[1]/'lib'
LIBRARIES = ('torch', 'transformers', 'transformers.modeling_utils', 'accelerate', 'bitsandbytes', 'peft', 'pandas')


def modules():
    "Names of the modules of the library."
    files = (f.relative_to(LIBRARY).with_suffix('') for f in sorted(LIBRARY.glob('underdog/**/*.py')))
    return ['.'.join(f.parts) for f in files if not f.name.startswith('_')]


def imports(name):
    "Does the module import in a process of its own?"
    child = os.fork()
    if child: return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        importlib.import_module(name)
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


if __name__ == '__main__':
    sys.path.insert(0, str(LIBRARY))
    for name in LIBRARIES: importlib.import_module(name)
    assert not any(name.startswith('underdog') for name in sys.modules)
    failed = [name for name in modules() if not imports(name)]
    if failed: sys.exit('these do not import: ' + ', '.join(failed))
    print(f'each of {len(modules())} modules imports')
