"""What a machine is and can do: every figure is measured, a part that fails costs no other, and a plan reads it.

The whole kernel runs once, pushed to the server on this machine, and once here."""
import json
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from underdog.core import UserError, read_json, write_json
from underdog.kernels import find_kernel, kernel_parameters
from underdog.text.prompt import PromptConfig
from underdog.model.settings import ModelConfig
from underdog.training.settings import TrainConfig
from underdog.search.calibrate import _timed_steps
from underdog.search.ceilings import measure_ceiling
from underdog.search.measured import part_of, read_measured
from underdog.kaggle.ship import LIBRARY, library_bundle, ship, ship_model
from underdog.kaggle.watch import progress_of
from underdog.kaggle.wheels import kaggle_image
from underdog.console import findings
from underdog.console.doctor import gate
from underdog.console.findings import compare_image, probe_checks, record_line, run_probe
from underdog.console.planning import plan
from underdog.console.probe import probe

SETTINGS = dict(steps=2, rank=4, max_length=128, quantization='none', batch_rows=4, processes=1)


def params_of(values): return [f'{name}={value}' for name, value in values.items()]


def states_of(found): return {name: part['state'] for name, part in found['parts'].items()}


@pytest.fixture(scope='module')
def probed(tmp_path_factory):
    "The folder of a probe of this machine without a rehearsal."
    folder = tmp_path_factory.mktemp('probed')
    run_probe(folder)
    return folder


# ---- on Kaggle, and here
def test_first_on_a_cpu_then_on_gpus(world, server, hub, tmp_path, capsys, monkeypatch):
    "Pushed, waited for, pulled; the free session gets neither model nor rows; doctor, plan and bundle read the file."
    monkeypatch.chdir(tmp_path)
    library_bundle(tmp_path/'library')
    ship(hub, tmp_path/'library', LIBRARY)
    ship_model(hub, world/'llama', 'me/tiny/transformers/llama')
    given = params_of(SETTINGS | dict(model='models/me/tiny/transformers/llama/1'))
    probe(given, out=tmp_path/'out', record=tmp_path/'T4.md', wheels=False, poll=.2)
    free, costly = (read_json(tmp_path/'out'/f'{slug}-1'/'probe'/'probe.json')
                    for slug in ('underdog-probe-cpu', 'underdog-probe'))

    # what was pushed
    first, second = (server.job(f'me/{slug}').version for slug in ('underdog-probe-cpu', 'underdog-probe'))
    assert (first['shape'], second['shape']) == ('None', 'NvidiaTeslaT4')
    assert first['request'].get('modelDataSources', []) == [] != second['request']['modelDataSources']

    # what was found: the driver of the server's T4s, and a machine that has none
    states = states_of(costly)
    assert states_of(free)['rehearsal'] == 'not measured' and 'no model was given' in free['parts']['rehearsal']['why']
    assert states.pop('all_reduce') == states.pop('attention') == 'not measured'
    assert set(states.values()) == {'measured'}
    assert [gpu['name'] for gpu in costly['parts']['driver']['gpus']] == ['Tesla T4', 'Tesla T4']
    assert any('tiny' in mount for mount in costly['parts']['machine']['mounts'])
    rehearsed = costly['parts']['rehearsal']
    assert (rehearsed['timed_steps'], rehearsed['rows'], rehearsed['not_finite']) == (2, 8, 0)

    # who reads it
    lines = (tmp_path/'T4.md').read_text().splitlines()
    assert len(lines) == 4 and costly['log'] in lines[3] and '2 steps' in lines[3]
    file = tmp_path/'out'/'underdog-probe-1'/'probe'/'probe.json'
    gate(probe_checks(file))
    assert kaggle_image(str(file)).holds(Requirement('torch>=2'))
    capsys.readouterr()
    plan(str(world/'llama'), calibrated=file, quantization='none', json_=True)
    told = json.loads(capsys.readouterr().out)
    values = {line['what']: line['value'] for line in told['lines']}
    assert told['accelerator'] == 'CPU'
    assert values['measured rate'] == costly['parts']['devices']['devices'][0]['products']['float32']['last']
    assert values['measured efficiency'] == read_measured(file).efficiency > 0


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path, capsys):
    with pytest.raises(UserError, match='rehearsal: UserError: nowhere: no such file'):
        probe(params_of(SETTINGS | dict(model='nowhere')), here=True, out=tmp_path, record=tmp_path/'T4.md')
    found = read_json(tmp_path/'probe'/'probe.json')
    states = states_of(found)
    assert states['rehearsal'] == 'failed' and states['devices'] == states['image'] == 'measured'
    # nothing is told that was not measured
    assert 'tokens/s' not in record_line(found)
    assert part_of(found, 'rehearsal') is None and read_measured(tmp_path/'probe'/'probe.json').efficiency is None


def test_a_killed_session_leaves_what_it_found(tmp_path, monkeypatch):
    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(findings, '_driver', killed)
    with pytest.raises(KeyboardInterrupt): run_probe(tmp_path)
    assert states_of(read_json(tmp_path/'probe.json')) == dict.fromkeys(['machine', 'packages', 'image'], 'measured')


def test_the_kernel_has_the_settings_of_the_training():
    for name, parameter in kernel_parameters(find_kernel('probe')).items():
        fields = [config for config in (ModelConfig, PromptConfig, TrainConfig) if name in config.parameters()]
        if name == 'model' or not fields: continue
        assert parameter.default == getattr(fields[0], fields[0].parameters()[name]), name


# ---- ceilings
def test_a_sum_over_two_processes(tmp_path):
    figures = measure_ceiling('all_reduce', tmp_path/'log', processes=2)
    assert figures['right'] and figures['processes'] == 2 and figures['gbs'] > 0


@pytest.mark.parametrize('slow_s,made', [(0., 5), (1., 1)])
def test_steps_end_with_their_time(monkeypatch, slow_s, made):
    clock = SimpleNamespace(now=0.)
    monkeypatch.setattr('underdog.search.calibrate.time.monotonic', lambda: clock.now)
    def make_step(number, rows): clock.now += slow_s
    training = SimpleNamespace(agree=bool, make_step=make_step, plan=range(9))
    assert len(_timed_steps(training, range(5), seconds=.5)) == made


def test_the_progress_of_a_wide_table_is_told_at_once():
    "It took minutes: a pattern that looks for a bar was tried at every space."
    assert progress_of(['train: 40%|####    | 4/10 [00:04<00:06]', 'a table' + ' '*30_000 + '100 %', ' '*30_000]) \
        == 'train 4 of 10 (40 %, 00:04<00:06)'


# ---- the image
def test_an_image_that_is_as_recorded_does_not_differ_and_any_other_does():
    record = kaggle_image()
    same = {name: version if version[:1].isdigit() else '1.0' for name, version in record.packages.items()}
    assert compare_image(same | dict(more='1'), record.python, record) == {}
    exact = next(name for name, version in record.packages.items() if version[:1].isdigit())
    for changed in (same | {exact: '0.0.1'}, {k: v for k, v in same.items() if k != exact}):
        assert list(compare_image(changed, record.python, record)) == [exact]
    assert 'fastcore' in compare_image(same | dict(fastcore='2.0'), record.python, record)
    assert list(compare_image(same, '3.13', record)) == ['python']


def test_wheels_of_a_push_are_no_part_of_the_image(probed, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, '_from_files', lambda: {'bitsandbytes'})
    write_json(tmp_path/'probe.json', dict(parts=dict(packages=findings._measured(findings._packages))))
    image = kaggle_image(str(tmp_path/'probe.json'))
    assert 'bitsandbytes' not in image.packages and 'torch' in image.packages
    with pytest.raises(UserError, match='what the image holds'):
        write_json(tmp_path/'probe.json', dict(parts={}))
        kaggle_image(str(tmp_path/'probe.json'))


# ---- who reads it
@pytest.mark.parametrize('change,state,text', [
    (dict(all_reduce=dict(state='measured', right=False, seconds=.1, gbs=1., processes=2, backend='nccl')), 'fail',
     'sum is wrong'),
    (dict(attention=dict(state='measured', passed=False, lines={'64': 'it failed'})), 'warn', 'span by span'),
    (dict(driver=dict(state='failed', why='the card fell off')), 'fail', 'probe.log'),
])
def test_doctor_tells_what_is_wrong(probed, tmp_path, change, state, text):
    found = read_json(probed/'probe.json')
    assert not [c for c in probe_checks(probed/'probe.json') if c.state == 'fail']
    write_json(tmp_path/'probe.json', dict(found, parts=found['parts'] | change))
    assert any(c.state == state and text in c.remedy for c in probe_checks(tmp_path/'probe.json'))


@pytest.mark.parametrize('parts', [None, [], dict(machine=3), dict(machine={}), dict(image=dict(state='measured')),
                                   dict(devices=dict(state='measured', devices=[{}]))])
def test_a_probe_that_is_not_whole_is_one_message(tmp_path, parts):
    write_json(tmp_path/'probe.json', {} if parts is None else dict(parts=parts))
    with pytest.raises(UserError, match='probe.json'): probe_checks(tmp_path/'probe.json')


def test_a_plan_wants_a_rate_that_was_measured(probed, tmp_path):
    found = read_json(probed/'probe.json')
    found['parts']['devices'] = dict(state='failed', why='no room')
    write_json(tmp_path/'probe.json', found)
    with pytest.raises(UserError, match='no room'): plan('mistral-7b', calibrated=tmp_path/'probe.json')


def test_a_faster_machine_takes_less_time(probed, tmp_path, capsys):
    found, hours = read_json(probed/'probe.json'), []
    for factor in (1, 2):
        found['parts']['devices']['devices'][0]['products']['float32']['last'] *= factor
        write_json(tmp_path/'probe.json', found)
        plan('deberta-v3-base', calibrated=tmp_path/'probe.json', quantization='none', json_=True)
        lines = json.loads(capsys.readouterr().out.splitlines()[-1])['lines']
        hours += [line['value'] for line in lines if line['what'] == 'training']
    assert hours[0] == pytest.approx(2*hours[1])
