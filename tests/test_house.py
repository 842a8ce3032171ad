"The house: who may import whom, every setting and name once, a front door that costs nothing, lines one can read."
import ast
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path

import pytest

import underdog
from underdog.session import SessionConfig
from underdog.kernels import find_kernel, kernel_folder, kernel_parameters
from underdog.text.prompt import PromptConfig
from underdog.model.settings import ModelConfig
from underdog.training.settings import TrainConfig
from underdog.inference.settings import InferConfig

LIBRARY = Path(underdog.__file__).parent
ROOT = Path(__file__).parents[1]
MODULES = sorted(f for f in LIBRARY.rglob('*.py') if f.name != '_modidx.py')
WITH_CODE = [f for f in MODULES if f.name != '__init__.py']


def path_of(file): return str(file.relative_to(LIBRARY))


def room_of(file): return file.relative_to(LIBRARY).parts[0].removesuffix('.py')


def imports_of(file):
    "Rooms of the library that a module imports, at its top or inside a function."
    package = ['underdog', *file.relative_to(LIBRARY).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        # a relative import begins as many folders up as it has dots, less one
        above = package[:len(package) - node.level + 1] if node.level else []
        parts = above + (node.module or '').split('.')
        if parts[0] == 'underdog': yield parts[1] or node.names[0].name


# ---- storeys
STOREYS = ['core', 'machine', 'session', 'process runfolder', 'kernels',
           'data', 'text', 'model', 'training inference', 'search', 'console', '__main__']


@pytest.mark.parametrize('file', WITH_CODE, ids=path_of)
def test_imports_go_down(file):
    """A room knows what lies below it, not its neighbour.

    kaggle knows the ground and data, and only console knows kaggle."""
    own = room_of(file)
    height = {room: i for i, storey in enumerate(STOREYS) for room in storey.split()}
    height['kaggle'] = height['data'] + .5
    for other in set(imports_of(file)) - {own}:
        assert height[other] < height[own], f'{own} imports {other}'
        assert other != 'kaggle' or own == 'console', f'{own} imports {other}'


# ---- settings
CONFIGS = dict(train=(ModelConfig, PromptConfig, TrainConfig, SessionConfig), infer=(InferConfig,))
NO_PARAMETER = dict(   # fields that a kernel does not offer, and why
    n_classes='of the competition',
    int8_threshold='of inference',
    head_act='found with a stored head',
    began='set by the kernel',
    question='part of the template',
    min_keep='part of the template',
    publish_s='for tests')
NO_FIELD = {'train_csv', 'test_csv', 'out', 'competition', 'run'}   # arguments of the kernel's one call


@pytest.mark.parametrize('kernel', CONFIGS)
def test_a_setting_stands_in_its_config_and_in_the_kernel_alike(kernel):
    parameters = kernel_parameters(find_kernel(kernel))
    offered = {}   # kernel parameter -> default of its field
    for config in CONFIGS[kernel]:
        for parameter, name in config.parameters().items(): offered[parameter] = getattr(config, name, '')
    assert set(parameters) - set(offered) == NO_FIELD & set(parameters)
    assert set(offered) - set(parameters) <= set(NO_PARAMETER)
    for name in set(offered) & set(parameters): assert parameters[name].default == offered[name], name
    # nothing but the model's path has to be said
    for config in CONFIGS[kernel]:
        needed = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
        assert needed in ([], ['path'])


@pytest.mark.parametrize('kernel', sorted(file.stem for file in kernel_folder().glob('*.ipynb')))
def test_papermill_reads_every_parameter_of_a_kernel(kernel, caplog):
    "It reads line by line, takes no line with a second '=' in it, and then warns of a parameter that is not known."
    from papermill import inspect_notebook
    assert set(inspect_notebook(str(find_kernel(kernel)))) == set(kernel_parameters(find_kernel(kernel)))
    assert not caplog.records


# ---- the front door
def test_the_front_door_opens_and_costs_nothing():
    for name in underdog.__all__: assert getattr(underdog, name).__name__ == name and name in dir(underdog)
    with pytest.raises(AttributeError, match='no attribute'): underdog.nothing
    code = """
import sys
before = set(sys.modules)
import underdog
print(*(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {'underdog'}, 'no other module is loaded: under 50 ms on any machine'


def test_no_folder_has_the_name_of_a_public_verb():
    rooms = {f.parent.name for f in MODULES if f.name == '__init__.py'} - {'underdog'}
    assert not rooms & set(underdog.__all__)
    for file in LIBRARY.glob('*/__init__.py'): assert not file.read_text(), file


# ---- what a person can read
@pytest.mark.parametrize('file', MODULES, ids=path_of)
def test_a_module_can_be_read(file):
    "Lines up to 120 columns, but for what nbdev writes; functions that fit on a screen, modules of one idea."
    source = file.read_text()
    assert len(source.encode()) <= 15_000, 'two ideas: split the notebook'
    tree, lines = ast.parse(source), source.splitlines()

    written_by_nbdev = {i for node in assignments_of_all(tree) for i in range(node.lineno, node.end_lineno + 1)}
    written_by_nbdev |= {i for i, line in enumerate(lines, 1) if line.startswith('# AUTOGENERATED')}
    wide = [i for i, line in enumerate(lines, 1) if len(line) > 120 and i not in written_by_nbdev]
    assert not wide, f'lines over 120 columns: {wide}'

    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef): continue
        function = lines[node.lineno - 1:node.end_lineno]
        assert len(function) <= 60, f'{node.name}: {len(function)} lines'
        characters = len('\n'.join(function))
        assert characters <= 2_500, f'{node.name}: {characters} characters'


def assignments_of_all(tree):
    "The statements that set `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__': yield node


@cache
def public_names(file):
    "The names in a module's `__all__`."
    return [name for node in assignments_of_all(ast.parse(file.read_text())) for name in ast.literal_eval(node.value)]


@pytest.mark.parametrize('file', WITH_CODE, ids=path_of)
def test_a_public_name_means_one_thing(file):
    "No other module has a public name of this one."
    homes = defaultdict(list)
    for module in WITH_CODE:
        for name in public_names(module): homes[name].append(path_of(module))
    shared = {name: homes[name] for name in public_names(file) if len(homes[name]) > 1}
    assert not shared


def bound_in(file):
    "The names that a module's top level binds, those of imports aside."
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        if not isinstance(node, ast.Assign): continue
        for target in node.targets:
            yield from (t.id for t in ast.walk(target) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store))


@pytest.mark.parametrize('file', WITH_CODE, ids=path_of)
def test_a_module_binds_a_name_once(file):
    "Of two branches that were merged one may have left an older value below the newer."
    names = list(bound_in(file))
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize('room', sorted(f.parent.name for f in LIBRARY.glob('*/__init__.py')))
def test_the_tree_for_who_carries_on_names_every_module(room):
    tree = re.search(r'```text\n(.*?)```', (ROOT/'CONTRIBUTING.md').read_text(), re.S)[1]
    named = re.search(rf'^  {room}/ (.*?)(?=^  \w+/|\n\n)', tree, re.S | re.M)[1].split()
    assert {f.stem for f in (LIBRARY/room).glob('*.py')} - {'__init__'} <= set(named)


@pytest.mark.parametrize('file', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda file: file.stem)
def test_a_notebook_is_one(file):
    "Kinds of cells as the format has them: of another kind, a paragraph is shown as code, and Jupyter warns."
    import nbformat
    nbformat.validate(nbformat.read(file, 4))
