"SECURITY.md: the tests that it names are there, and what it says of every place in the code is so."
import ast
import re
from pathlib import Path

import pytest
from test_house import MODULES, path_of

from underdog.console.figures import figure_png, plot_curves

ROOT = Path(__file__).parents[1]


def calls(tree, *names):
    "Calls of functions or methods with one of these names, and the function around each."
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef): continue
        for node in ast.walk(function):
            name = isinstance(node, ast.Call) and (getattr(node.func, 'attr', '') or getattr(node.func, 'id', ''))
            if name in names: yield node, ast.unparse(function)


def given(call): return {word.arg: ast.unparse(word.value) for word in call.keywords}


def test_the_tests_that_it_names_are_there():
    named = set(re.findall(r'tests/\w+\.py', (ROOT/'SECURITY.md').read_text()))
    assert len(named) > 5
    for name in named: assert (ROOT/name).is_file(), name


@pytest.mark.parametrize('file', MODULES, ids=path_of)
def test_no_module_runs_code_that_it_reads(file):
    "No remote code, no pickles, no arrays of objects, no YAML with objects."
    tree = ast.parse(file.read_text())
    for _, function in calls(tree, 'from_pretrained'):
        assert 'trust_remote_code=False' in function and 'local_files_only=True' in function, function
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {'pickle', 'joblib', 'dill', 'cloudpickle', 'shelve', 'marshal'}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)): continue
        name = ast.unparse(node.func)
        if name == 'torch.load': assert given(node)['weights_only'] == 'True'
        if name == 'np.load': assert given(node)['allow_pickle'] == 'False'
        assert name not in ('yaml.load', 'yaml.unsafe_load', 'pd.read_pickle', 'tarfile.open', 'shutil.unpack_archive')
        assert name not in ('os.system', 'os.popen') and given(node).get('shell') != 'True'


def test_the_name_of_a_run_is_no_mathematics():
    import pandas as pd
    metrics = pd.DataFrame([dict(step=1, eval_loss=1.), dict(step=2, eval_loss=.9)])
    for name in ('$\\frac{', '$x$', '$', '[/x]', '{a}', '_x_'): assert figure_png(plot_curves({name: metrics}))
