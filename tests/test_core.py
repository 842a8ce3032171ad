"The ground: atomic files, values from text, Kaggle's mounts, kernels, the run folder, competitions."
import dataclasses
import json
import math
import resource
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from underdog import kernels
from underdog.core import (
    UserError, atomic_folder, atomic_path, atomic_write, build_id, coerce, file_hash, fingerprint, nearest, read_json,
    versions, write_json)
from underdog.data.competition import COMPETITIONS, LLM_FINETUNING, LMSYS, WSDM, detect_competition, get_competition
from underdog.kernels import check_parameters, find_kernel, kernel_parameters
from underdog.machine import on_kaggle, pick_dtype, resolve_input, seed_everything
from underdog.runfolder import RunFolder
from underdog.inference.settings import InferConfig
from underdog.model.settings import CHOICES, ModelConfig
from underdog.session import SessionConfig, duration, locked
from underdog.text.prompt import PromptConfig
from underdog.training.settings import TrainConfig


@dataclass(frozen=True)
class Example:
    path: str
    lr: float = 1e-4
    rank: int = 16
    layers: int | None = None
    merge: bool = False
    extra: dict = field(default_factory=dict)


# ---- atomic files
@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_leaves_the_old_file_and_nothing_else_on_error(tmp_path, error):
    target = tmp_path/'submission.csv'
    atomic_write(target, 'old')
    with pytest.raises(error), atomic_path(target) as tmp:
        tmp.write_text('half')
        raise error()
    assert target.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['submission.csv']


def test_atomic_path_makes_folders_is_a_sibling_and_is_readable_by_others(tmp_path):
    target = tmp_path/'deep'/'er'/'x.bin'
    with atomic_path(target) as tmp:
        assert tmp.parent == target.parent and not target.exists()
        tmp.write_bytes(b'\0\xff')
    assert target.read_bytes() == b'\0\xff' and target.stat().st_mode & 0o400
    plain = tmp_path/'plain'
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


def test_json_is_numpy_safe_and_a_broken_file_is_named(tmp_path):
    write_json(tmp_path/'a.json', dict(loss=np.float32(.5), n=np.int64(3), y=np.eye(2), name='é\n', path=tmp_path))
    assert read_json(tmp_path/'a.json') | {'path': 0} == dict(loss=.5, n=3, y=[[1, 0], [0, 1]], name='é\n', path=0)
    with pytest.raises(TypeError): write_json(tmp_path/'a.json', dict(x=object()))
    assert read_json(tmp_path/'a.json')['n'] == 3   # the failed write has not touched it
    broken = {'half.json': b'{"a": ', 'bytes.json': b'\xff\xfe', 'deep.json': b'['*100_000}
    for name, content in broken.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(UserError, match=name): read_json(tmp_path/name)
    with pytest.raises(UserError, match='missing.json: no such file'): read_json(tmp_path/'missing.json')
    with pytest.raises(UserError): read_json(tmp_path)


# ---- fingerprints
def test_fingerprint_is_stable_and_separates_parts():
    assert fingerprint('ab', 'c') != fingerprint('a', 'bc') != fingerprint('abc')
    assert fingerprint({'b': 1, 'a': 2}) == fingerprint({'a': 2, 'b': 1})
    assert fingerprint(np.arange(3)) != fingerprint(np.arange(3.))
    assert fingerprint(np.zeros((2, 3))) != fingerprint(np.zeros((3, 2)))
    # of objects the values count, not their addresses
    other = ''.join(['b', 'c'])
    assert fingerprint(np.array(['a', 'bc'], object)) == fingerprint(np.array(['a', other], object))
    assert len(fingerprint('\ud83d')) == 16


def test_file_hash_depends_on_content_only(tmp_path):
    (tmp_path/'a').write_bytes(b'x'*300_000)
    (tmp_path/'b').write_bytes(b'x'*300_000)
    (tmp_path/'c').write_bytes(b'x'*299_999 + b'y')
    assert file_hash(tmp_path/'a') == file_hash(tmp_path/'b') != file_hash(tmp_path/'c')


def test_versions_and_build_id_are_plain_text():
    assert {'python', 'torch', 'transformers'} <= versions().keys() and json.dumps(versions())
    assert build_id() == build_id() and '+' in build_id()


# ---- coerce
@pytest.mark.parametrize('name,text,value', [
    ('lr', '1e-5', 1e-5), ('lr', 3, 3.0), ('lr', np.float32(.5), .5),
    ('rank', '8', 8), ('rank', 8.0, 8), ('rank', '1e2', 100), ('rank', str(2**60 + 1), 2**60 + 1),
    ('rank', np.int64(4), 4), ('rank', '-3', -3),
    ('layers', None, None), ('layers', 'None', None), ('layers', '', None), ('layers', '6', 6),
    ('merge', 'true', True), ('merge', 'False', False), ('merge', 1, True), ('merge', '0', False),
    ('path', '', '')])
def test_coerce_understands_text(name, text, value):
    result = getattr(coerce(Example, {'path': 'p', name: text}), name)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize('name,bad', [
    ('lr', 'fast'), ('lr', True), ('lr', [1]), ('lr', None),
    ('rank', 2.5), ('rank', '2.5'), ('rank', 'nan'), ('rank', 'inf'), ('rank', '--3'), ('rank', True), ('rank', ''),
    ('layers', 'many'), ('merge', 'yes please'), ('merge', 2), ('path', 4), ('path', None)])
def test_coerce_refuses_and_names_the_setting(name, bad):
    with pytest.raises(UserError, match=f'^{name}='): coerce(Example, {'path': 'p', name: bad})


def test_coerce_names_unknown_and_missing_settings():
    with pytest.raises(UserError, match="unknown setting 'rnak'.*did you mean rank"):
        coerce(Example, dict(path='p', rnak=8))
    with pytest.raises(UserError, match='needs path'): coerce(Example, dict(lr=1))


@given(st.floats(allow_nan=False), st.integers(-10**30, 10**30))
def test_coerce_reads_back_what_repr_writes(lr, rank):
    config = coerce(Example, dict(path='p', lr=repr(lr), rank=repr(rank)))
    assert (config.lr, config.rank) == (lr, rank)


NAMES = st.sampled_from(['path', 'lr', 'rank', 'layers', 'merge', 'zzz'])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(st.dictionaries(NAMES, VALUES))
def test_coerce_never_raises_anything_but_user_error(values):
    try: coerce(Example, values)
    except UserError: pass


CONFIGS = {ModelConfig: dict(path='m'), PromptConfig: {}, TrainConfig: {}, SessionConfig: {}, InferConfig: {}}


@pytest.mark.parametrize('config, name, bad', [
    (PromptConfig, 'max_length', None), (PromptConfig, 'max_length', True), (TrainConfig, 'lr', 'fast'),
    (TrainConfig, 'checkpointing', 4), (ModelConfig, 'targets', ['q_proj']), (ModelConfig, 'lora_layers', 4),
    (InferConfig, 'quantization', None), (SessionConfig, 'save_minutes', 'soon')])
def test_a_config_that_is_written_in_python_is_checked_like_a_kernels(config, name, bad):
    with pytest.raises(UserError, match=f'^{name}='): config(**CONFIGS[config] | {name: bad})


def test_a_config_that_is_written_in_python_has_the_types_of_its_fields():
    assert PromptConfig(max_length='512') == PromptConfig(max_length=512.) == PromptConfig(max_length=512)
    assert type(PromptConfig(max_length=512.).max_length) is int and TrainConfig(fold='1').fold == 1
    assert ModelConfig(Path('m')) == ModelConfig('m') and TrainConfig(fold='all').fold == 'all'


@given(st.sampled_from([(config, f.name) for config in CONFIGS for f in fields(config)]), VALUES)
def test_no_value_of_a_setting_raises_anything_but_user_error(setting, value):
    config, name = setting
    with suppress(UserError): config(**CONFIGS[config] | {name: value})


@pytest.mark.parametrize('name', ['4bit', 'nf', 'zzz'])
def test_of_few_names_a_hint_tells_all(name):
    "The closest one is a guess: '4bit' is closest to int8."
    assert all(choice in nearest(name, CHOICES['quantization']) for choice in CHOICES['quantization'])


@given(st.floats(-1, 1e9))
def test_a_duration_is_written_as_people_write_it(seconds):
    number, unit = duration(seconds).split()
    assert set(number) <= set('0123456789.,') and unit in ('s', 'min', 'h')
    told = float(number.replace(',', ''))*{'s': 1, 'min': 60, 'h': 3600}[unit]
    assert abs(told - max(0, seconds)) <= max(.01, .051*seconds)


# ---- inputs
MOUNTED = ('datasets/ann/lmsys-runs/run-1', 'competitions/wsdm-cup', 'old-slug/sub', 'notebooks/bob/train',
           'models/google/gemma-2/transformers/2b-it/2', 'old-model/transformers/2b/1')


@pytest.fixture
def mounts(tmp_path):
    "An input folder with both layouts of Kaggle."
    root = tmp_path/'input'
    for folder in MOUNTED: (root/folder).mkdir(parents=True)
    (root/'competitions/wsdm-cup/train.parquet').touch()
    return root


@pytest.mark.parametrize('spec,path', [
    # datasets, with and without their owner
    ('ann/lmsys-runs', 'datasets/ann/lmsys-runs'),
    ('lmsys-runs', 'datasets/ann/lmsys-runs'),
    ('lmsys-runs/run-1', 'datasets/ann/lmsys-runs/run-1'),
    ('ann/lmsys-runs/run-1/', 'datasets/ann/lmsys-runs/run-1'),
    ('datasets/ann/lmsys-runs', 'datasets/ann/lmsys-runs'),
    # competitions
    ('wsdm-cup', 'competitions/wsdm-cup'),
    ('competitions/wsdm-cup/train.parquet', 'competitions/wsdm-cup/train.parquet'),
    ('wsdm-cup/train.parquet', 'competitions/wsdm-cup/train.parquet'),
    # the old layout has neither kinds nor owners
    ('old-slug', 'old-slug'),
    ('carl/old-slug/sub', 'old-slug/sub'),
    ('datasets/carl/old-slug', 'old-slug'),
    ('competitions/old-slug', 'old-slug'),
    # notebooks and models
    ('bob/train', 'notebooks/bob/train'),
    ('google/gemma-2/transformers/2b-it/2', 'models/google/gemma-2/transformers/2b-it/2'),
    ('models/google/gemma-2/transformers/2b-it/2', 'models/google/gemma-2/transformers/2b-it/2'),
    ('models/meta/old-model/transformers/2b/1', 'old-model/transformers/2b/1')])
def test_both_mount_layouts_are_found(mounts, spec, path):
    assert resolve_input(spec, mounts) == mounts/path
    assert resolve_input(f'{mounts}/{spec}', mounts) == mounts/path


@pytest.mark.parametrize('spec', [
    '', 'bob/lmsys-runs', 'lmsys-rums', '[', '**', 'a\0b', 'x'*5000, '~nobody-here/x', 'datasets/carl/lmsys-runs'])
def test_what_is_not_there_is_a_user_error(mounts, spec):
    with pytest.raises(UserError): resolve_input(spec, mounts)


def test_the_error_lists_what_is_mounted(mounts):
    with pytest.raises(UserError, match=r'lmsys-rums.*holds: .*datasets/ann/lmsys-runs'):
        resolve_input('lmsys-rums', mounts)


def test_a_disk_too_full_for_an_archive_is_no_missing_input(mounts, monkeypatch, tmp_path):
    monkeypatch.setenv('UNDERDOG_CACHE', str(tmp_path/'cache'))
    with zipfile.ZipFile(mounts/'datasets'/'ann'/'big.zip', 'w') as z: z.writestr('big/weights', bytes(5000))
    # files of this process may have so many bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match='disk of .*cache is too full to unpack it; free some space'):
            resolve_input('ann/big/weights', mounts)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path/'cache'/'unpacked').iterdir())   # nor is half of it kept
    assert resolve_input('ann/big/weights', mounts).read_bytes() == bytes(5000)


def test_a_local_path_wins(mounts, tmp_path, monkeypatch):
    (tmp_path/'old-slug').mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_input('old-slug', mounts).resolve() == tmp_path/'old-slug'


def test_on_kaggle_reads_the_environment(monkeypatch):
    monkeypatch.delenv('KAGGLE_KERNEL_RUN_TYPE', raising=False)
    assert not on_kaggle()
    monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Batch')
    assert on_kaggle()


def test_dtype_on_cpu_is_fp32_with_a_reason_and_t4_gets_fp16(monkeypatch):
    import torch
    assert pick_dtype('cpu')[0] == torch.float32 and pick_dtype('cpu')[1]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    dtypes = {(6, 0): torch.float16, (7, 5): torch.float16, (8, 0): torch.bfloat16, (9, 0): torch.bfloat16}
    for capability, dtype in dtypes.items():
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *a, c=capability: c)
        assert pick_dtype('cuda:0')[0] == dtype


def test_seeding_repeats_the_draws():
    import torch
    draws = []
    for _ in range(2):
        seed_everything(7)
        draws.append((np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


# ---- kernels
def write_kernel(path, source="name = 'a'   # what it is called\nlayers = None\nfast = False\n", tags=('parameters',)):
    "A notebook at `path` with one cell."
    import nbformat
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = nbformat.v4.new_code_cell(source, metadata={'tags': list(tags)})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


@pytest.mark.parametrize('library', ['lib', ''], ids=['in a checkout', 'uploaded'])
def test_kernels_of_the_library_come_before_those_of_the_working_directory(tmp_path, monkeypatch, library):
    "And what lies above the checkout does not count."
    checkout, work = tmp_path/'above'/'checkout', tmp_path/'work'
    (checkout/library).mkdir(parents=True)
    monkeypatch.setattr(kernels, 'library_root', lambda: checkout/library)
    write_kernel(tmp_path/'above'/'nbs'/'kernels'/'xyz.ipynb')
    shipped = write_kernel(checkout/'nbs'/'kernels'/'train.ipynb')
    write_kernel(work/'nbs'/'kernels'/'train.ipynb')
    own = write_kernel(work/'nbs'/'kernels'/'own.ipynb')
    monkeypatch.chdir(work)
    assert find_kernel('train') == shipped and find_kernel('own') == own and find_kernel(str(own)) == own
    with pytest.raises(UserError, match='known: train, own'): find_kernel('xyz')
    with pytest.raises(UserError, match='no such notebook'): find_kernel('train.ipynb')


def test_without_any_kernel_the_message_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, 'library_root', lambda: tmp_path/'site-packages')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='install underdog again, or give the path'): find_kernel('train')


def test_parameters_are_read_and_checked(tmp_path):
    path = write_kernel(tmp_path/'k.ipynb')
    assert kernel_parameters(path) == dict(name=('a', 'what it is called'), layers=(None, ''), fast=(False, ''))
    assert check_parameters(path, dict(layers='6', fast='true')) == dict(layers=6., fast=True)
    assert check_parameters(path, dict(layers=6)) == dict(layers=6)
    with pytest.raises(UserError, match="no parameter 'layer': did you mean layers"):
        check_parameters(path, dict(layer=6))
    with pytest.raises(UserError, match='0 cells are tagged'):
        kernel_parameters(write_kernel(tmp_path/'bare.ipynb', tags=()))
    with pytest.raises(UserError, match='line 2 of the parameters cell'):
        kernel_parameters(write_kernel(tmp_path/'odd.ipynb', 'a = 1\nprint(a)'))
    (tmp_path/'text.ipynb').write_text('not a notebook')
    with pytest.raises(UserError, match='text.ipynb: not a notebook'): kernel_parameters(tmp_path/'text.ipynb')


# ---- run folder
CONFIG = dict(model=dict(path='m', head='pair'), prompt={}, template_hash='t', base_hash='b', competition='lmsys')


def test_run_folder_keeps_status_and_metrics(tmp_path):
    run = RunFolder.create(tmp_path/'run', CONFIG)
    assert run.status['state'] == 'running' and run.metrics().empty
    run.log(step=1, loss=np.float32(1.5))
    for state in ('paused', 'finished', 'failed', 'running'):
        run.set_status(state, step=3, of=9, reason='time', elapsed_s=1.26)
        assert run.status == dict(state=state, step=3, of=9, reason='time', elapsed_s=1.3)
    with pytest.raises(ValueError): run.set_status('asleep')
    again = RunFolder.open(tmp_path/'run')
    assert again.config == CONFIG and again.metrics()['loss'].tolist() == [1.5]
    assert {p.name for p in run.path.iterdir()} == {'config.json', 'status.json', 'metrics.jsonl'}
    again.cut_metrics(0)
    assert again.metrics().empty
    RunFolder(tmp_path/'run').clear()
    assert not list(run.path.iterdir())   # a new run inherits nothing


def test_a_killed_write_costs_one_line_and_not_the_next(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG)
    run.log(step=1)
    with open(run.metrics_file, 'ab') as f: f.write(b'{"step": 2, "lo\xc3')
    assert run.metrics()['step'].tolist() == [1]
    run.log(step=3)
    assert run.metrics()['step'].tolist() == [1, 3]


def test_what_comes_after_a_checkpoint_is_cut(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG)
    for step in (1, 2, 3):
        run.log(step=step)
        run.log(step=step, eval_loss=1.)
    run.cut_metrics(2, evaluated=False)
    assert run.metrics()['step'].tolist() == [1, 1, 2]
    assert run.metrics()['eval_loss'].notna().tolist() == [False, True, False]


def test_what_is_not_a_run_folder_says_so(tmp_path):
    with pytest.raises(UserError, match='not a run folder'): RunFolder.open(tmp_path)
    write_json(tmp_path/'config.json', dict(model={}))
    with pytest.raises(UserError, match='lacks prompt'): RunFolder.open(tmp_path)
    with pytest.raises(UserError, match='no such file'): RunFolder.open(tmp_path/'nowhere')


# ---- competitions
def test_competitions_are_found_by_name_slug_and_columns():
    for c in COMPETITIONS:
        assert get_competition(c.name) is c and get_competition(c.slug) is c
        assert c.submission_columns[0] == 'id' and len(c.label_columns) in (1, c.n_classes)
    with pytest.raises(UserError, match='did you mean lmsys'): get_competition('lmsis')
    assert detect_competition(['id', 'prompt', *LMSYS.label_columns]) is LLM_FINETUNING
    assert detect_competition(['id', 'prompt', 'winner']) is WSDM
    assert detect_competition(['id', 'prompt']) is LLM_FINETUNING
    assert LLM_FINETUNING.slug == 'llm-classification-finetuning'
    assert (WSDM.classes, WSDM.metric) == (('a', 'b'), 'accuracy')


def test_a_run_of_the_closed_board_is_one_of_the_open_board():
    "Same files, same question: it is resumed and blended; a run of another question is not."
    from underdog.training.prepare import differences
    old, new, other = (dict(competition=c.name) for c in (LMSYS, LLM_FINETUNING, WSDM))
    assert differences(old, new) == [] and differences(old, other) == ['competition']


# ---- what others may have left
def test_a_number_that_is_not_finite_is_no_setting():
    from underdog.inference.settings import InferConfig
    from underdog.model.settings import ModelConfig
    from underdog.session import SessionConfig
    from underdog.text.prompt import PromptConfig
    from underdog.training.settings import TrainConfig
    for cls, given in ((TrainConfig, {}), (SessionConfig, {}), (InferConfig, {}), (PromptConfig, {}),
                       (ModelConfig, dict(path='m'))):
        numbers = [f.name for f in dataclasses.fields(cls) if f.type in (float, float | None)]
        assert numbers
        for name in numbers:
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(UserError, match=f'{name}='): cls(**given, **{name: value})


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    file = tmp_path/'token'
    file.write_text('secret')
    file.chmod(0o600)
    atomic_write(file, 'another')
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_lock_that_is_a_link_empties_nothing(tmp_path):
    file = tmp_path/'thesis.txt'
    file.write_text('years of work')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'.lock').symlink_to(file)
    with pytest.raises(UserError, match='a link'), locked(tmp_path/'out'): pass
    assert file.read_text() == 'years of work'


def test_a_folder_in_which_no_parquet_file_can_be_written_is_not_begun(tmp_path):
    with pytest.raises(UserError, match='not UTF-8'), locked(tmp_path/'caf\udce9'): pass
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def write(text, fails=False):
        with atomic_folder(tmp_path/'out') as tmp:
            (tmp/'file').write_text(text)
            if fails: raise RuntimeError('in the middle')
    write('one')
    with pytest.raises(RuntimeError): write('two', fails=True)
    assert (tmp_path/'out'/'file').read_text() == 'one'
    write('three')
    assert (tmp_path/'out'/'file').read_text() == 'three' and [p.name for p in tmp_path.iterdir()] == ['out']
