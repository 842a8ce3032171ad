"""Folders on their way to Kaggle: with a key or a pickle in them, which must stay at home, and harmless ones."""
import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import shutil
import zipfile
import zlib

import numpy as np
import pandas as pd
from hypothesis import strategies as st
from safetensors.numpy import save

from benchmarks.siege_world import drawn, dump
from underdog.core import UserError
from underdog.kaggle.contents import check_contents

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


def written(write):
    "The bytes that `write` gives a file."
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def hashes(rng):
    numbers = rng.integers(0, 50_000, 2_000)
    return pd.DataFrame(dict(id=numbers, hash=[hashlib.md5(str(n).encode()).hexdigest() for n in numbers]))


def vocabulary(rng):
    words = {f'<|reserved_special_token_{i}|>': i for i in range(300)}
    return words | {f'tok{n}en': int(n) for n in rng.integers(0, 50_000, 4_000)}


def picture(rng): return base64.b64encode(b'\x89PNG\r\n\x1a\n' + rng.bytes(30_000))


def notebook(rng):
    image = dict(output_type='display_data', data={'image/png': picture(rng).decode()}, metadata={})
    cell = dict(cell_type='code', source='key = df["key"]\ntoken_ids = tok(text)', outputs=[image], metadata={})
    return dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)


# what people ship: name of the file -> its bytes, from a random generator
HARMLESS = {
    'ids.bin': lambda rng: rng.integers(0, 50_000, 4_000).astype(np.int32).tobytes(),
    'ids.npy': lambda rng: numpys(np.save, rng.integers(0, 50_000, 4_000)),
    'hashes.json': lambda rng: json.dumps(dict(zip(*hashes(rng).astype(str).T.to_numpy()))).encode(),
    'hashes.csv': lambda rng: hashes(rng).to_csv().encode(),
    'rows.parquet': lambda rng: written(hashes(rng).to_parquet),
    'rows.arrow': lambda rng: written(hashes(rng).to_feather),
    'page.html': lambda rng: b'<img src="data:image/png;base64,' + picture(rng) + b'">',
    'token.txt': lambda rng: base64.urlsafe_b64encode(rng.bytes(30_000)),
    'tokenizer.json': lambda rng: json.dumps(dict(vocab=vocabulary(rng))).encode(),
    'tokenizer_config.json':
        lambda rng: json.dumps(dict(eos_token='<|eot_id|>', pad_token_id=151643, key='value')).encode(),
    'model.safetensors': lambda rng: save({'w': rng.normal(size=4_000)}),
    'picture.png': lambda rng: base64.b64decode(picture(rng)),
    'raw': lambda rng: rng.bytes(30_000),
    'lib.whl': lambda rng: zipped('a/b.py', 'token = tokens[1234567890]\nkey = "x"'),
    'log.gz': lambda rng: gzip.compress(b'step 100 loss 1.0 tokens 123456789012345678\n'*100),
    'lesson.ipynb': lambda rng: json.dumps(notebook(rng)).encode(),
    'config.yaml': lambda rng: f'commit: {rng.bytes(20).hex()}\ntoken_type: 0\nkey: name\nseed: 1\n'.encode(),
    'runs.jsonl': lambda rng: b''.join(b'{"id": "%s"}\n' % rng.bytes(16).hex().encode() for _ in range(200)),
    'merges.txt': lambda rng: '\n'.join(f'{a:c}{b:c} {b:c}{a:c}' for a, b in rng.integers(97, 123, (900, 2))).encode(),
    'spiece.model': lambda rng: b''.join(b'\n\x0e\n\x05' + rng.bytes(5) + b'\x15' + rng.bytes(4) for _ in range(900)),
    'arrays.npz': lambda rng: numpys(np.savez, rng.normal(size=500)),
    'notes.md': lambda rng: 'A password is asked for; set KAGGLE_KEY=... first.\ntoken: your-token-here\n'.encode(),
}


@st.composite
def harmless(draw):
    "(name, bytes) of what people ship."
    name = draw(st.sampled_from(sorted(HARMLESS)))
    return name, HARMLESS[name](np.random.default_rng(draw(st.integers(0, 10**6))))


# ---- whole folders
PACKERS = dict(gz=gzip.compress, bz2=bz2.compress, xz=lzma.compress, zip=lambda raw: zipped('in/side.txt', raw))
NAMES = st.sampled_from(['w', 'notes.txt', 'rows.csv', 'x.bin', 'weights.pt', 'cfg.yaml', 'model.safetensors', 'é.md',
                         'no suffix', 'a.b.c', 'README', 'log.1', 'vocab.json', 'v.npy', 'train.parquet'])
AROUND = ('', 'text before it ', '"', "  '", '\t', '{"a": 1}\n', '# ', '\ufeff')
ENCODINGS = ('utf-8', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-8-sig', 'utf-32')


@st.composite
def forbidden(draw):
    "(name, bytes) of a file with a key or a pickle in it, plain or packed."
    if draw(st.booleans()):
        place = draw(st.sampled_from([*PLACES, None, None, None]))
        key = draw(keys())
        if place: return PLACES[place][0], PLACES[place][1](key)
        lines = draw(st.lists(st.text('abc xyz,.{}[]"', max_size=60), max_size=30))
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(AROUND)) + key)
        raw = draw(st.sampled_from(['\n', '\r\n'])).join(lines).encode(draw(st.sampled_from(ENCODINGS)))
    else:
        kind = draw(st.sampled_from(sorted(PICKLES)))
        raw = PICKLES[kind](draw(st.integers(0, 5)))
        if kind == 'gz_in_zip': return draw(NAMES), raw   # no deeper is promised
    for packer in draw(st.lists(st.sampled_from(sorted(PACKERS)), max_size=1)): raw = PACKERS[packer](raw)
    return draw(NAMES), raw


@st.composite
def folders(draw):
    "({name: bytes} of a folder, the name of the file that must not leave, or None)."
    files = {f'{draw(st.sampled_from(["", "a/", "a/b c/"]))}{name}': raw
             for name, raw in draw(st.lists(harmless(), min_size=1, max_size=3))}
    if draw(st.booleans()): return files, None
    name, raw = draw(forbidden())
    name = f'{draw(st.sampled_from(["", "z/", "a/z/"]))}{name}'
    return files | {name: raw}, name


def attack(world, kind, n, seed):
    "Twice `n` folders: about half of them must not leave."
    for files, bad in drawn(folders(), 2*n, seed):
        folder = world.folder/'ship'
        shutil.rmtree(folder, ignore_errors=True)
        for name, raw in files.items():
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            (folder/name).write_bytes(raw)
        faults, text = [], ''
        try: check_contents(folder)
        except UserError as e: faults, text = ['refused_harmless']*(bad is None), str(e)
        except Exception as e: faults, text = ['tracebacks'], f'{type(e).__name__}: {e}'
        else: faults = ['leaks']*(bad is not None)
        kind.note(f'{text} {dump({bad: files[bad]} if bad else sorted(files))}', faults)
