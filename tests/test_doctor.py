"The doctor: a well run is all green, each way to be ill is one red line that names it, and a red line stops a kernel."
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import slow
from fixtures import small_run

from underdog.console import doctor
from underdog.console.doctor import Check, free_space, gate, gpus, imports_offline, packages
from underdog.console.run_doctor import kernel_checks, run_checks, wants_bitsandbytes
from underdog.core import UserError, write_json
from underdog.inference.settings import InferConfig
from underdog.kernels import run_kernel
from underdog.runfolder import RunFolder

LINES = ('state', 'template, tokenizer, base', 'versions', 'reload equality', 'validation loss', 'swap consistency')
DOUBTS = ('worth its hours', 'what is read')   # of five steps over the first tokens of rows
COMMAND = [sys.executable, '-c', '# warm\nfrom underdog.console.main import main; main()']


def states(checks): return {c.name: c.state for c in checks}


def red(checks): return [c for c in checks if c.state == 'fail']


@pytest.fixture
def patient(finished, tmp_path):
    "A copy of a finished run, to be made ill."
    shutil.copytree(finished.path, tmp_path/'run')
    return RunFolder(tmp_path/'run')


# ---- a run
def test_a_well_run_is_green(finished):
    assert states(run_checks(finished.path)) == dict.fromkeys(LINES, 'ok') | dict.fromkeys(DOUBTS, 'warn')


@slow
def test_another_head_in_four_bits_is_green(world, tmp_path):
    run = small_run(world, tmp_path/'run', head='joint', quantization='nf4')
    assert not red(run_checks(run.path))
    # one order at inference: the order bias of the head is no error of the run
    assert not red(run_checks(run.path, InferConfig(tta=False)))


def test_an_adapter_of_another_training_is_seen_on_the_rows(patient):
    from safetensors.torch import load_file, save_file
    file = patient.adapter/'head.safetensors'
    slope = lambda v: torch.linspace(-1, 1, v.numel()).reshape(v.shape)
    save_file({k: v + 3*torch.ones_like(v)*slope(v) for k, v in load_file(file).items()}, file)
    assert {'reload equality', 'validation loss'} & {c.name for c in red(run_checks(patient.path))}
    # another precision is only doubtful
    in_four_bits = run_checks(patient.path, InferConfig(quantization='nf4'))
    assert 'reload equality' not in {c.name for c in red(in_four_bits)}


def damage(file, how):
    "Damage a file of weights."
    from safetensors.torch import load_file, save_file
    raw = file.read_bytes()
    if how in ('shapes', 'nan', 'huge'):
        change = dict(shapes=lambda v: v[None].clone(), nan=lambda v: v*torch.nan, huge=lambda v: v + 3e38)
        save_file({k: change[how](v) for k, v in load_file(file).items()}, file)
    elif how == 'gone': file.unlink()
    else: file.write_bytes(dict(empty=b'', cut=raw[:len(raw)//2], length=b'\xff'*8 + raw[8:],
                               name=raw[:40] + b'+\xf8\n\x95\xff' + raw[45:])[how])


@pytest.mark.parametrize('name,ways', [('adapter', ['empty', 'name', 'shapes', 'nan']),
                                       ('head', ['cut', 'length', 'huge', 'gone'])])
def test_a_damaged_adapter_is_a_red_line(patient, name, ways, capfd):
    "Whatever became of it, the doctor ends, and says so without a traceback."
    whole = (patient.adapter/f'{name}.safetensors').read_bytes()
    for how in ways:
        damage(patient.adapter/f'{name}.safetensors', how)
        lines = red(run_checks(patient.path))
        if how == 'huge': assert {'reload equality', 'validation loss'} <= {c.name for c in lines}
        # what failed comes first, not how many processes it took with it
        else: assert len(lines) == 1 and lines[0].seen.startswith(f'{patient.adapter}/{name}.safetensors: '), how
        assert 'Traceback' not in capfd.readouterr().err, how
        (patient.adapter/f'{name}.safetensors').write_bytes(whole)


def test_texts_of_other_rows_are_seen(patient):
    rows = pd.read_parquet(patient.check_file)
    rows['response_a'] = np.roll(rows['response_a'].to_numpy(), 1)
    rows.to_parquet(patient.check_file)
    assert 'reload equality' in {c.name for c in red(run_checks(patient.path))}


@pytest.mark.parametrize('change,name', [(dict(template_hash='x'), 'template'), (dict(base_hash='x'), 'base model')])
def test_another_template_or_base_is_red(patient, change, name):
    write_json(patient.config_file, patient.config | change)
    lines = red(run_checks(patient.path))
    assert len(lines) == 1 and name in lines[0].seen


def test_an_unfinished_run_says_what_there_is(world, tmp_path):
    run = small_run(world, tmp_path/'run', session=dict(time_limit=1e-6))
    line, = red(run_checks(run.path))
    assert 'paused at step' in line.seen and 'start it again' in line.remedy


# ---- the machine
def test_old_or_missing_packages(monkeypatch):
    assert states(packages()) == {'packages': 'ok'}
    monkeypatch.setattr(doctor, 'NEEDED', {'torch': '99', 'no-such-package': '1'})
    assert states(packages(False)) == {'package torch': 'warn', 'package no-such-package': 'fail', 'packages': 'ok'}


def test_only_what_is_quantized_wants_bitsandbytes(finished, patient):
    "A kernel that infers asks for it where the run, or its own setting, says so."
    runs, own = [finished.path], InferConfig()
    assert not wants_bitsandbytes(runs, own) and wants_bitsandbytes(runs, InferConfig(quantization='int8'))
    config = patient.config
    write_json(patient.config_file, config | dict(model=config['model'] | dict(quantization='nf4')))
    assert wants_bitsandbytes([*runs, patient.path], own)
    assert not wants_bitsandbytes([*runs, patient.path], InferConfig(quantization='none'))


def test_disk_and_memory(tmp_path):
    assert states(free_space(tmp_path)) == {'disk': 'ok', 'memory': 'ok'}
    assert red(free_space(tmp_path/'a'/'b', disk_gb=1e9))


def test_imports_without_the_internet(tmp_path, monkeypatch):
    line, = red(imports_offline(('no_such_module',)))
    assert line.seen.endswith("No module named 'no_such_module'")
    code = 'import urllib.request\nurllib.request.urlopen("http://example.org", timeout=3)\n'
    (tmp_path/'calls_home.py').write_text(code)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    assert 'wants the internet' in red(imports_offline(('calls_home',)))[0].seen
    # what is killed, as where memory is short, says nothing at all
    (tmp_path/'dies.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n')
    assert red(imports_offline(('dies',)))[0].seen == 'the imports ended with code -9'


def test_no_gpu_is_doubtful_and_red_where_one_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert states(gpus())['GPUs'] == 'warn' and 'T4 x2' in red(gpus(2))[0].remedy
    monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Batch')
    assert red(gpus())


def test_what_a_single_t4_lacks(monkeypatch):
    t4 = dict(device_count=lambda: 1, get_device_name=lambda i: 'Tesla T4', get_device_capability=lambda i=0: (7, 5),
              get_device_properties=lambda i: SimpleNamespace(total_memory=15*2**30), is_available=lambda: True)
    for name, value in t4.items(): monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Batch')
    lines = {c.name: c for c in gpus()}
    assert lines['GPUs'].seen == 'Tesla T4 (sm_75, 15 GiB)' and lines['second GPU'].state == 'warn'
    assert 'float16' in lines['dtype'].seen and 'tl.dot' in lines['Triton'].seen


# ---- the gate
def test_a_red_line_stops_but_not_a_scored_run(monkeypatch, capsys):
    checks = [Check('fine', 'ok', 'yes'), Check('GPUs', 'fail', 'none', 'set [the] accelerator')]
    with pytest.raises(UserError, match=r'GPUs: none \(set \[the\] accelerator\)'): gate(checks)
    monkeypatch.setenv('KAGGLE_IS_COMPETITION_RERUN', '1')
    gate(checks)
    assert 'set [the] accelerator' in capsys.readouterr().out


# ---- a kernel
def test_kernels_are_checked_before_they_run(world, finished):
    given = dict(train_csv=str(world/'train.csv'), model=str(world/'llama'))
    assert not red(kernel_checks('train', given))
    assert {c.name for c in red(kernel_checks('train', {}))} == {'train_csv', 'model'}
    test_csv = str(world/'test.csv')
    assert not red(kernel_checks('infer', dict(run=str(finished.path), test_csv=test_csv)))
    assert 'not a run folder' in red(kernel_checks('infer', dict(run=str(world), test_csv=test_csv)))[0].seen
    with pytest.raises(UserError, match='did you mean lr'): kernel_checks('train', dict(lrr='1'))


def test_a_kernel_with_an_ill_run_stops_in_its_gate(world, patient, tmp_path):
    write_json(patient.config_file, patient.config | dict(template_hash='x'))
    parameters = dict(run=str(patient.path), test_csv=str(world/'test.csv'), out=str(tmp_path/'out'))
    with pytest.raises(UserError, match='template'): run_kernel('infer', parameters, tmp_path)
    assert not (tmp_path/'out').exists()


def test_a_base_model_that_has_moved_is_said_where(finished, patient, monkeypatch, capsys):
    from underdog.console.commands import doctor as command
    monkeypatch.setattr(doctor, 'environment', lambda *_, **__: [])
    config = patient.config
    write_json(patient.config_file, config | dict(model=config['model'] | dict(path='models/before')))
    with pytest.raises(UserError, match='models/before: no such file.*--base'): command(str(patient.path))
    command(str(patient.path), base=finished.config['model']['path'], json_=True)
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {line['name']: line['state'] for line in lines} == dict.fromkeys(LINES, 'ok') | dict.fromkeys(DOUBTS, 'warn')
    with pytest.raises(UserError, match='--base is of a run'): command('train', base='x')


@pytest.mark.parametrize('target, told', [('runs/1/run', 'runs/1/run: no run folder'), ('trian', 'did you mean train'),
                                          ('train -p lrr=1', 'did you mean lr')])
def test_a_slip_is_told_before_the_machine_is_looked_at(target, told, monkeypatch, tmp_path):
    from underdog.console.commands import doctor as command
    def looked_at(*_, **__): raise AssertionError('the machine was looked at')
    monkeypatch.setattr(doctor, 'environment', looked_at)
    monkeypatch.chdir(tmp_path)
    target, _, given = target.partition(' -p ')
    with pytest.raises(UserError, match=told): command(target, [given] if given else None)


def test_the_command_line():
    done = subprocess.run([*COMMAND, 'doctor', 'train', '-p', 'train_csv=nothing.csv'], capture_output=True, text=True)
    assert 'kernelspec' in done.stdout and done.returncode == 1
    assert done.stderr.count('\n') == 1 and 'nothing.csv: no such file' in done.stderr
