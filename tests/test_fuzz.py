"""A run folder with any file broken in any way: one clear message or none, never a traceback, never a file left behind.
(Broken csv files: test_data.py.)"""
import contextlib
import io
import json
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from underdog.model.merge import load_adapter
from underdog.inference.blend import Blend, gather_oof
from underdog.training.checkpoint import Checkpoints
from underdog.core import UserError, coerce, read_json
from underdog.runfolder import RunFolder
from underdog.console.run_doctor import run_checks
from underdog.data.floors import Floors
from underdog.inference.job import check_run
from underdog.inference.settings import InferConfig
from underdog.training.prepare import differences, find_earlier
from underdog.text.prompt import PromptConfig
from underdog.session import Session
from underdog.training.settings import TrainConfig


@pytest.fixture(scope='module')
def patient(finished, tmp_path_factory):
    "A run folder to be broken again and again, with a checkpoint and a blend in it."
    folder = tmp_path_factory.mktemp('patient')/'run'
    shutil.copytree(finished.path, folder)
    import torch
    for step in (1, 2): Checkpoints(folder/'checkpoint').save(step, dict(step=step, w=torch.ones(9)))
    Blend(dict(length=.5, model=.7)).save(folder/'blend.json')
    return folder


def read_config(run):
    r = RunFolder.open(run)
    differences(r.config, r.config)
    find_earlier(run, r.config)
    coerce(TrainConfig, r.config['train']), coerce(PromptConfig, r.config['prompt'])
    check_run(r, InferConfig())


def read_status(run): run_checks(run, predict=False)


def read_metrics(run):
    RunFolder(run).metrics()
    RunFolder(run).cut_metrics(3)


def read_oof(run): gather_oof([RunFolder.open(run)])


def read_floors(run): Floors.load(run/'floors')


def read_adapter(run): load_adapter(run/'adapter')


def read_blend(run): Blend.load(run/'blend.json')


def read_checkpoint(run): assert Checkpoints(run/'checkpoint').load()['step'] in (1, 2)


READERS = {
    'config.json': read_config,
    'status.json': read_status,
    'metrics.jsonl': read_metrics,
    'oof.parquet': read_oof,
    'floors/floors.json': read_floors,
    'floors/floors.safetensors': read_floors,
    'adapter/model.json': read_adapter,
    'adapter/head.safetensors': read_adapter,
    'adapter/adapter.safetensors': read_adapter,
    'blend.json': read_blend,
    'checkpoint/step-00000002.pt': read_checkpoint,
    'checkpoint/step-00000002.json': read_checkpoint,
}


def lists_and_dicts(x): return st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(leaves, lists_and_dicts, max_leaves=6)


def survives(run, name):
    "The reader of `name` gives something or a `UserError` of one paragraph."
    before = {f for f in run.rglob('*')}
    try:
        with contextlib.redirect_stdout(io.StringIO()): READERS[name](run)
    except UserError as e: assert 0 < len(str(e)) < 2000 and 'Traceback' not in str(e)
    assert {f for f in run.rglob('*')} - before <= {run/name}


@contextlib.contextmanager
def broken(run, name, content):
    whole = (run/name).read_bytes()
    (run/name).write_bytes(content)
    try: yield
    finally: (run/name).write_bytes(whole)


few = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
edit_lists = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=3)   # a place and what is put there


@few
@given(name=st.sampled_from(sorted(READERS)), cut=st.floats(0, 1), edits=edit_lists)
@example('config.json', 0., [])
@example('oof.parquet', 0., [])
def test_cut_and_overwritten_files(patient, name, cut, edits):
    content = bytearray((patient/name).read_bytes())
    for at, put in edits: content[int(at*len(content)):int(at*len(content)) + len(put)] = put
    if not edits: content = content[:int(cut*len(content))]
    with broken(patient, name, bytes(content)): survives(patient, name)


@few
@given(name=st.sampled_from([n for n in sorted(READERS) if n.endswith('.json')]), value=values, data=st.data())
def test_any_json_in_any_place(patient, name, value, data):
    found = read_json(patient/name)
    keys = data.draw(st.lists(st.sampled_from(sorted(found)), max_size=1))
    inner = found[keys[0]] if keys else None
    if isinstance(inner, dict) and inner and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(inner)))
        found[keys[0]] = inner | {key: value}
    elif keys: found[keys[0]] = value
    else: found = value
    with broken(patient, name, json.dumps(found).encode()): survives(patient, name)


@few
@given(line=st.text(max_size=30) | values.map(json.dumps))
def test_any_line_in_the_metrics(patient, line):
    whole = (patient/'metrics.jsonl').read_bytes()
    added = line.encode('utf-8', 'surrogatepass') + b'\n'
    with broken(patient, 'metrics.jsonl', whole + added): survives(patient, 'metrics.jsonl')


@pytest.mark.parametrize('name', sorted(READERS))
def test_missing_files_and_folders_in_their_place(patient, name):
    whole = (patient/name).read_bytes()
    (patient/name).unlink()
    try:
        survives(patient, name)
        (patient/name).unlink(missing_ok=True)
        (patient/name).mkdir()
        survives(patient, name)
        (patient/name).rmdir()
    finally: (patient/name).write_bytes(whole)


def test_a_session_without_a_stop_file_is_not_stopped(): assert Session().asked() == ''
