"The house: who may import whom, every setting once, a front door that costs nothing, lines that a person can read."
import ast
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import underdog
from underdog.inference.job import InferConfig
from underdog.kernels import find_kernel, kernel_parameters
from underdog.model.model import ModelConfig
from underdog.session import SessionConfig
from underdog.text.prompt import PromptConfig
from underdog.training.settings import TrainConfig

LIBRARY = Path(underdog.__file__).parent
MODULES = sorted(f for f in LIBRARY.rglob('*.py') if f.name != '_modidx.py')


def room_of(file): return file.relative_to(LIBRARY).parts[0].removesuffix('.py')


def imports_of(file):
    "Rooms of the library that a module imports, at its top or inside a function."
    package = ['underdog', *file.relative_to(LIBRARY).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        parts = (package[:len(package) - node.level + 1] if node.level else []) + (node.module or '').split('.')
        if parts[0] == 'underdog': yield parts[1] or node.names[0].name


# ---- floors
GROUND = ['core', 'machine', 'session', 'process runfolder', 'kernels']
FLOORS = [floor.split() for floor in (*GROUND, 'data', 'text', 'model', 'training inference', 'search', 'console')]


@pytest.mark.parametrize('file', [f for f in MODULES if f.name != '__init__.py'], ids=lambda f: str(f.relative_to(LIBRARY)))
def test_imports_go_down(file):
    "A room knows the floors below it, not its neighbour; kaggle knows the ground and data, and only console knows kaggle."
    own, height = room_of(file), {room: i for i, floor in enumerate(FLOORS) for room in floor}
    height['kaggle'] = height['data'] + .5
    for other in set(imports_of(file)) - {own}:
        assert height[other] < height[own], f'{own} imports {other}'
        assert other != 'kaggle' or own == 'console', f'{own} imports {other}'


# ---- settings
CONFIGS = dict(train=(ModelConfig, PromptConfig, TrainConfig, SessionConfig), infer=(InferConfig,))
NO_PARAMETER = dict(   # fields that a kernel does not offer, and why
    n_classes='of the competition', int8_threshold='of inference', head_act='found with a stored head', began='set by the kernel',
    question='part of the template', min_keep='part of the template', publish_s='for tests')
NO_FIELD = {'train_csv', 'test_csv', 'out', 'competition', 'run'}   # arguments of the kernel's one call


@pytest.mark.parametrize('kernel', CONFIGS)
def test_a_setting_stands_in_its_config_and_in_the_kernel_alike(kernel):
    parameters = kernel_parameters(find_kernel(kernel))
    offered = {p: getattr(config, name) if hasattr(config, name) else '' for config in CONFIGS[kernel] for p, name in config.parameters().items()}
    assert set(parameters) - set(offered) == NO_FIELD & set(parameters)
    assert set(offered) - set(parameters) <= set(NO_PARAMETER)
    for name in set(offered) & set(parameters): assert parameters[name][0] == offered[name], name
    for config in CONFIGS[kernel]:
        assert [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING] in ([], ['path'])


# ---- the front door
def test_the_front_door_opens_and_costs_nothing():
    for name in underdog.__all__: assert getattr(underdog, name).__name__ == name and name in dir(underdog)
    with pytest.raises(AttributeError, match='no attribute'): underdog.nothing
    code = 'import sys; before = set(sys.modules); import underdog; print(*(set(sys.modules) - before))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {'underdog'}, 'no other module is loaded: under 50 ms on any machine'


def test_no_folder_has_the_name_of_a_public_verb():
    rooms = {f.parent.name for f in MODULES if f.name == '__init__.py'} - {'underdog'}
    assert not rooms & set(underdog.__all__)
    for file in LIBRARY.glob('*/__init__.py'): assert not file.read_text(), file
