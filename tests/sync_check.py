"""Do notebooks, exported library and README say the same?

`python tests/sync_check.py` cleans and exports a copy of the checkout and compares; nothing here is touched.
`--write` does it in place.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
PARTS = ('nbs', 'lib', 'README.md')
NOT_COPIED = ('.venv*', '_docs', '.git', 'runs', '__pycache__', '.pytest_cache', '*.egg-info')
HEADER = '<!-- made from nbs/index.ipynb by `make export`; edit the notebook -->'


def readme(root):
    "README.md from nbs/index.ipynb: markdown cells as they are, code cells as fenced blocks with their text outputs."
    blocks = [HEADER]
    for cell in nbformat.read(root/'nbs'/'index.ipynb', 4).cells:
        if cell.source.startswith('#| hide'): continue
        if cell.cell_type == 'markdown':
            # pictures lie beside the notebook
            blocks.append(cell.source.replace('](images/', '](nbs/images/'))
            continue
        source = cell.source.removeprefix('%%capture\n')
        blocks.append(f'```python\n{source}\n```')
        texts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell.get('outputs', [])]
        if any(texts): blocks.append('```text\n' + ''.join(texts).rstrip() + '\n```')
    (root/'README.md').write_text('\n\n'.join(blocks) + '\n', encoding='utf-8')


def export(root):
    "Clean the notebooks, export the library and write the README of the checkout at `root`."
    env = dict(os.environ, PYTHONPATH=str(root/'lib'))
    for name in ('nbdev_clean', 'nbdev_export'):
        program = Path(sys.executable).with_name(name)
        subprocess.run([program], cwd=root, check=True, env=env, stdout=subprocess.DEVNULL)
    readme(root)


def hashes(root):
    "{path: hash} of every file under PARTS, tracked or not; caches aside."
    files = []
    for part in PARTS: files += [root/part] if (root/part).is_file() else (root/part).rglob('*')
    cache = lambda f: {'__pycache__', '.ipynb_checkpoints'} & set(f.parts) or '.egg-info' in str(f)
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in files if f.is_file() and not cache(f)}


def main():
    if '--write' in sys.argv: return export(ROOT)
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'checkout'
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        subprocess.run(['git', 'init', '-q'], cwd=copy, check=True)   # nbdev asks git for the root of the repository
        export(copy)
        before, after = hashes(ROOT), hashes(copy)
    differ = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    if not differ: return print(f'{len(before)} files in sync')
    sys.exit('out of sync: ' + ', '.join(differ) + '\nrun `make export` and commit the result')


if __name__ == '__main__': main()
