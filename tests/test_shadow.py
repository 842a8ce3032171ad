"""The library's own steps and predictions on two T4s that are not there: laws of precision and place, recorded costs.

Every family, head, quantization and place of the embedding, in pairs; how it is done stands in `shadow_cuda`."""
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from conftest import REPO
from fixtures import DECODERS
from shadow_cuda import guard

FIGURES = REPO/'tests'/'shadow_cuda'/'figures.json'
RECORD = 'UNDERDOG_RECORD=1 python -m pytest -n 0 tests/test_shadow.py'
LIBRARIES = ('torch', 'transformers', 'peft', 'accelerate', 'bitsandbytes')   # whose versions the figures depend on

needs_compiler = pytest.mark.skipif(shutil.which('g++') is None, reason='no g++ to build devices that are not there')
needs_cpu_build = pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None,
                                     reason='devices that are not there want a CPU build of torch')


def installed(): return {name: version(name).split('+')[0] for name in LIBRARIES}


def run_cases(families):
    "The lines that a child prints: it makes its devices before it imports torch."
    path = os.pathsep.join([str(REPO/'lib'), str(REPO/'tests'), os.environ.get('PYTHONPATH', '')])
    child = subprocess.run([sys.executable, '-m', 'shadow_cuda.cases', *families], capture_output=True, text=True,
                           env=os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS='1'))
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith('{')]


# ---- laws of a case: each yields what is wrong
def trained(case):
    step = case['step']
    if step['skipped'] or step['not_finite'] or not step['adapter_norm'] > 0:
        yield f'the step trained nothing: {step}'


def in_half_precision(case):
    # LayerNorm gives fp32 under autocast, and so does the sum behind it
    entering = 'torch.float16' if case['family'] in DECODERS else 'torch.float32'
    if case['entering'] != [entering]: yield f"what enters the layers is {case['entering']}, not all {entering}"
    # norms and the sums of their gradients are fp32 of [T, h], which is in the figures; nothing is larger
    if case['wider']: yield f"in a step fp32 tensors larger than [T, h] are made by {case['wider']}"


def attends_in_half_precision(case):
    calls = case['attention']
    for name in calls:
        if set(re.findall(r'(?:b?float)\d+', name)) != {'float16'}: yield f'attention: {name}, {calls[name]} times'
    if not any('backward' in name for name in calls): yield f'no kernel of attention ran backward: {calls}'


def in_one_launch(case):
    if case['family'] == 'deberta': return
    if not case['line'].startswith('attention: all spans of a layer in one launch, tested'): yield case['line']
    # BERT has dropout in its attention
    if case['family'] != 'bert' and case['figures']['span']:
        yield f"one launch for all spans costs {case['figures']['span']} kernels for each of them"


def answers_as_a_cpu(case):
    if not case['error'] < .01*case['largest']:
        yield f"logits in fp16 are off by {case['error']:.2g} from those in fp32, which are up to {case['largest']:.2g}"


def launches_where_it_computes(case):
    if case['current'] != 1: yield f"cuda:{case['current']} is current while cuda:1 predicts: Triton launches there"


def costs_what_is_recorded(case, recorded):
    "Fewer kernels, copies and waits are as wrong as more: the record would hold nothing."
    changes = [f'{name} {recorded.get(name)} -> {case["figures"].get(name)}'
               for name in sorted(case['figures'].keys() | recorded.keys())
               if case['figures'].get(name) != recorded.get(name)]
    if changes: yield f"costs are not those that are recorded ({', '.join(changes)}); if that is meant: {RECORD}"


LAWS = (trained, in_half_precision, attends_in_half_precision, in_one_launch, answers_as_a_cpu,
        launches_where_it_computes)


def test_the_guard_of_one_torch_is_not_that_of_another(tmp_path):
    "It is linked to a torch: when a checkout with the same version is removed, those of others work on."
    one, other = (guard.target(tmp_path/name/'torch') for name in ('one', 'other'))
    assert one != other and one == guard.target(tmp_path/'one'/'torch')


@needs_compiler
@needs_cpu_build
@pytest.mark.parametrize('families', ['llama qwen2', 'gemma2 mistral', 'deberta bert'])
def test_on_two_cards_that_are_not_there(families):
    devices, *cases = run_cases(families.split())
    wrong = [f'tensors of two devices may meet: {name}' for name in devices['mixed']]
    wrong += [f"{case['case']}: {line}" for case in cases for law in LAWS for line in law(case)]
    # costs depend on the libraries; those of other versions are not recorded
    recorded = json.loads(FIGURES.read_text()) if FIGURES.exists() else dict(versions=installed(), cases={})
    if os.environ.get('UNDERDOG_RECORD'): record(recorded, cases)
    elif recorded['versions'] == installed():
        for case in cases:
            costs = costs_what_is_recorded(case, recorded['cases'].get(case['case'], {}))
            wrong += [f"{case['case']}: {line}" for line in costs]
    assert not wrong, '\n' + '\n'.join(wrong)


def record(recorded, cases):
    "Write the figures of some cases, a line each, beside the others."
    lines = recorded['cases'] | {case['case']: case['figures'] for case in cases}
    lines = [f'  {json.dumps(name)}: {json.dumps(figures)}' for name, figures in sorted(lines.items())]
    versions = json.dumps(installed())
    FIGURES.write_text(f'{{"versions": {versions},\n "cases": {{\n' + ',\n'.join(lines) + '\n }}\n')


def test_figures_belong_to_the_pinned_versions():
    "Otherwise no figure would be held."
    pinned = dict(re.findall(r'^([\w-]+)==([\w.]+)', (REPO/'constraints.txt').read_text(), re.M))
    versions = json.loads(FIGURES.read_text())['versions']
    assert versions == {name: pinned[name] for name in LIBRARIES}, f'record the costs anew: {RECORD}'
