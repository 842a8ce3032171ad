"What leaves for Kaggle: no key and no pickle, in whatever file; and nothing that was not looked at."
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st

from underdog.core import UserError
from underdog.kaggle.contents import check_contents, manifest
from underdog.kaggle.ship import _stage

sys.path.insert(0, str(REPO))
from benchmarks.siege_folders import PICKLES, PLACES, harmless, keys   # noqa: E402

SOME = settings(max_examples=60, deadline=None)


def checked(name, content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/'sub').mkdir()
        (Path(folder)/'sub'/name).write_bytes(content)
        check_contents(folder)


@SOME
@given(keys(), st.sampled_from(sorted(PLACES)))
def test_a_key_is_found_wherever_it_lies(key, place):
    name, made = PLACES[place]
    with pytest.raises(UserError, match='looks like a key') as e: checked(name, made(key))
    assert key not in str(e.value)


@SOME
@given(st.sampled_from(sorted(PICKLES)), st.integers(0, 5),
       st.sampled_from(['w.pt', 'w.bin', 'w.data', 'w.gz', 'model.safetensors', 'x.npy', 'README.md', 'w']))
def test_a_pickle_is_found_under_any_name(kind, protocol, name):
    with pytest.raises(UserError, match='runs code'): checked(name, PICKLES[kind](protocol))


def test_what_torch_saves_is_found(tmp_path):
    import torch
    for name, new in (('new.weights', True), ('old.weights', False)):
        torch.save({'a': torch.zeros(2)}, tmp_path/name, _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match='runs code'): check_contents(tmp_path)
        (tmp_path/name).unlink()


@settings(max_examples=200, deadline=None)
@given(harmless())
def test_what_is_harmless_goes_through(file): checked(*file)


def test_only_files_that_were_looked_at_are_staged(tmp_path, monkeypatch):
    "Hidden files and folders behind links stay at home; a nested manifest is a file like others."
    monkeypatch.setenv('UNDERDOG_CACHE', str(tmp_path/'cache'))
    folder, outside = tmp_path/'data', tmp_path/'outside'
    for name in ('sub/.kaggle/access_token', 'sub/.env', 'sub/rows.csv', 'sub/bundle.json', 'top.csv'):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text('x')
    outside.mkdir()
    (outside/'thesis.txt').write_text('not yours')
    (folder/'sub'/'link').symlink_to(outside)
    place = _stage(folder, 'some-data', manifest(folder))
    staged = {f.relative_to(place).as_posix() for f in place.rglob('*') if f.is_file()}
    assert staged == {'sub/rows.csv', 'sub/bundle.json', 'top.csv', 'bundle.json'}
    # what the client packs is the same
    packed = shutil.make_archive(str(tmp_path/'sub'), 'zip', place/'sub')
    names = {name for name in zipfile.ZipFile(packed).namelist() if not name.endswith('/')}
    assert names == {'rows.csv', 'bundle.json'}
