"What leaves for Kaggle: no key and no pickle, in whatever file; and nothing that was not looked at."
import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from underdog.core import UserError
from underdog.kaggle.contents import check_contents, manifest
from underdog.kaggle.ship import _stage

LETTERS = st.text('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789', min_size=36, max_size=36)
HEX = st.text('0123456789abcdef', min_size=32, max_size=32)
PASSWORDS = st.text('abcdefgh0123456789', min_size=20, max_size=30).map(lambda text: 'a1b2c3' + text)


@st.composite
def keys(draw):
    "A line with a key or a password in it, as people leave them."
    letters, number, password = draw(LETTERS), draw(HEX), draw(PASSWORDS)
    return draw(st.sampled_from([
        f'KGAT_{number}', f'hf_{letters}', f'ghp_{letters}', f'github_pat_{letters}', f'sk-proj-1{letters}',
        f'AKIA{number[:16].upper()}', f'AIza{letters[:35]}', f'xoxb-{letters}', '-----BEGIN RSA PRIVATE KEY-----',
        json.dumps(dict(username='me', key=number)), f'api_key = "{password}"', f'api_key: {password}',
        f'export KAGGLE_KEY={password}', f'password: {password}', f'machine example.org login me password {password}',
        f'postgresql://me:{password}@example.org/rows', f"client_secret='{password}'"]))


def many(text): return f'{text}\n'*3


def zipped(name, data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive: archive.writestr(name, data)
    return out.getvalue()


def numpys(save_it, *arrays):
    out = io.BytesIO()
    save_it(out, *arrays)
    return out.getvalue()


# how a line lies in a file: name of the file -> its bytes
PLACES = dict(
    notes=('notes.md', lambda key: many(key).encode()),
    lines=('rows.jsonl', lambda key: (json.dumps(dict(text='x')) + f'\n{key}\n').encode()),
    cells=('rows.csv', lambda key: f'id,text\n1,{key}\n'.encode()),
    wide=('wide.txt', lambda key: many(key).encode('utf-16')),
    far=('far.log', lambda key: b'a line of a log\n'*400_000 + key.encode() + b'\n'),
    bare=('Makefile', lambda key: f'all:\n\n{key}\n'.encode()),
    packed=('old.gz', lambda key: gzip.compress(many(key).encode())),
    archive=('old.zip', lambda key: zipped('sub/notes.txt', many(key))),
    header=('model.safetensors', lambda key: save({'a': np.zeros(2)}, dict(note=f'x\n{key}\n'))),
)
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


class Program:
    def __reduce__(self): return print, ('it ran',)


def pickled(protocol): return pickle.dumps(Program(), protocol)


PICKLES = dict(
    plain=pickled,
    gz=lambda p: gzip.compress(pickled(p)),
    bz2=lambda p: bz2.compress(pickled(p)),
    xz=lambda p: lzma.compress(pickled(p)),
    zlib=lambda p: zlib.compress(pickled(p)),
    zip=lambda p: zipped('a/data.pkl', pickled(p)),
    gz_in_zip=lambda p: zipped('a/b', gzip.compress(pickled(p))),
    npy=lambda p: numpys(np.save, np.array([{}, None], dtype=object)),
    npz=lambda p: numpys(np.savez, np.array([[], {}], dtype=object)),
)


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


@st.composite
def harmless(draw):
    "(name, bytes) of what people ship."
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    numbers, raw = rng.integers(0, 50_000, 4_000), rng.bytes(30_000)
    table = pd.DataFrame(dict(id=numbers, hash=[hashlib.md5(str(n).encode()).hexdigest() for n in numbers]))
    arrow, parquet = io.BytesIO(), io.BytesIO()
    table.to_parquet(parquet)
    table.to_feather(arrow)
    vocabulary = {f'<|reserved_special_token_{i}|>': i for i in range(300)} | {f'tok{n}en': int(n) for n in numbers}
    return draw(st.sampled_from([
        ('ids.bin', numbers.astype(np.int32).tobytes()), ('ids.npy', numpys(np.save, numbers)),
        ('hashes.json', json.dumps(dict(zip(table['hash'], table['hash']))).encode()),
        ('hashes.csv', table.to_csv().encode()), ('rows.parquet', parquet.getvalue()), ('rows.arrow', arrow.getvalue()),
        ('page.html', b'<img src="data:image/png;base64,' + base64.b64encode(raw) + b'">'),
        ('token.txt', base64.urlsafe_b64encode(raw)), ('tokenizer.json', json.dumps(dict(vocab=vocabulary)).encode()),
        ('tokenizer_config.json', json.dumps(dict(eos_token='<|eot_id|>', pad_token_id=151643, key='value')).encode()),
        ('model.safetensors', save({'w': rng.normal(size=4_000)})), ('picture.png', b'\x89PNG\r\n\x1a\n' + raw),
        ('raw', raw), ('lib.whl', zipped('a/b.py', 'token = tokens[1234567890]\nkey = "x"')),
        ('log.gz', gzip.compress(b'step 100 loss 1.0 tokens 123456789012345678\n'*100))]))


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
