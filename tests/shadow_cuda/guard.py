"The compiled device guard, made once for each version of its source and each torch."
import hashlib
import os
import subprocess
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name('guard.cpp')


def target(torch_folder):
    "Where the guard for the torch in this folder lies. It is linked to that one: of another it must know nothing."
    key = hashlib.sha256(SOURCE.read_bytes() + b'\0' + os.fsencode(torch_folder)).hexdigest()[:12]
    return Path(tempfile.gettempdir())/f"underdog_shadow_{os.getuid()}_{version('torch')}_{key}.so"


def compiled(torch_folder):
    "The guard's file for the torch in this folder, compiled where it is not there."
    file, python = target(torch_folder), sysconfig.get_paths()['include']
    if not file.exists():
        built = file.with_suffix(f'.{os.getpid()}')
        includes = [f'-I{torch_folder}/include', f'-I{torch_folder}/include/torch/csrc/api/include', f'-I{python}']
        libraries = [f'-L{torch_folder}/lib', f'-Wl,-rpath,{torch_folder}/lib', '-lc10', '-ltorch_cpu']
        command = ['g++', '-O1', '-shared', '-fPIC', '-std=c++20', *includes, str(SOURCE), '-o', str(built), *libraries]
        subprocess.run(command, check=True)
        built.replace(file)   # two processes may build at once
    return file
