"""Is what the notebooks show what they print today? The site shows it beside the code.

`python tests/kept_outputs.py NOTEBOOK…` runs each in a kernel of its own and names the cells that print something else
today; `--write` keeps that. Slow cells are left as they are, but with `--slow`. Bars of progress and warnings are not
kept, nor is an output with a path of this machine. Figures of time and memory differ from run to run, so this is no
part of `make check`."""
import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbdev.config import get_config
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ENV = dict(PYTHONPATH=f'{ROOT}/tests/offline:{ROOT}/lib', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1',
           TOKENIZERS_PARALLELISM='false')
BAR = re.compile(r'\r|\x1b|^[\w ]+:\s+\d+%\|')   # of progress, which is drawn over itself
SAME = 2.   # of 255: by how much two pictures differ in the mean that look alike


def left_out(cell):
    "Is it a cell that does not run here?"
    directives = ' '.join(line for line in cell.source.splitlines() if line.startswith('#|'))
    flags = {*get_config().tst_flags.split(), 'eval: false', 'default_exp'}
    if '--slow' in sys.argv: flags -= {'slow'}
    return cell.cell_type != 'code' or any(flag in directives for flag in flags)


def run(path):
    "{id of a cell: its outputs} of the cells of a notebook that run here."
    notebook = nbformat.read(path, 4)
    ran = [cell.id for cell in notebook.cells if not left_out(cell)]
    notebook.cells = [cell for cell in notebook.cells if cell.id in ran]
    NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    return {cell.id: readable(cell.outputs) for cell in notebook.cells}


def readable(outputs):
    "The outputs that are for a reader, without metadata; printed lines are one output."
    kept, printed = [], None
    for output in outputs:
        output.pop('execution_count', None)
        if output.output_type == 'stream':
            lines = [line for line in re.findall(r'[^\n]*\n|[^\n]+', output.text) if not BAR.search(line)]
            if output.name == 'stderr' or not ''.join(lines).strip(): continue
            if printed is None: kept.append(printed := nbformat.v4.new_output('stream', name='stdout', text=''))
            printed.text += ''.join(lines)
        elif output.output_type in ('execute_result', 'display_data'):
            output.metadata = {}
            if output.output_type == 'execute_result': output.execution_count = None
            kept.append(output)
    return kept


def text_of(outputs):
    "What they say; addresses in memory aside."
    data = [output.get('data', {}) for output in outputs]
    texts = [output.get('text') or d.get('text/plain', '') for output, d in zip(outputs, data)]
    return re.sub(r'0x[0-9a-f]+', '0x', '\n'.join(text.strip() for text in texts))


def alike(one, other):
    "Do both show the same?"
    if text_of(one) != text_of(other): return False
    pictures = [[output.data['image/png'] for output in outputs if 'image/png' in output.get('data', {})]
                for outputs in (one, other)]
    pixels = [[np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'), float) for png in pngs]
              for pngs in pictures]
    return len(pixels[0]) == len(pixels[1]) and all(
        a.shape == b.shape and np.abs(a - b).mean() < SAME for a, b in zip(*pixels))


def of_this_machine(outputs):
    "Is there a path of this machine in them?"
    return any(str(place) in text_of(outputs) for place in (ROOT, Path.home(), tempfile.gettempdir()))


def main():
    os.environ.update(ENV)
    write, differ = '--write' in sys.argv, []
    for path in [Path(a).resolve() for a in sys.argv[1:] if not a.startswith('--')]:
        fresh, notebook = run(path), nbformat.read(path, 4)
        shown = {i: fresh[cell.id] for i, cell in enumerate(notebook.cells) if cell.id in fresh}
        others = [i for i, outputs in shown.items()
                  if not alike(notebook.cells[i].outputs, outputs) and not of_this_machine(outputs)]
        for i in others:
            cell = notebook.cells[i]
            print(f'{path.relative_to(ROOT)} cell {i}\n  kept: {text_of(cell.outputs)[:300]}\n'
                  f'  now:  {text_of(shown[i])[:300]}', flush=True)
            cell.outputs = shown[i]
        if write and others:
            path.write_text(nbformat.writes(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        differ += others
    sys.exit(bool(differ) and not write)


if __name__ == '__main__': main()
