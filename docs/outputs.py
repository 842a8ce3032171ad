"""The results that the site shows on the pages of the kernels: `make demo`, then `python docs/outputs.py`.

The notebooks themselves are kept without outputs. Results only: what tells of one machine (the doctor's table) or moves
(bars of progress) stays out. A cell that has changed since shows nothing."""
import json
import sys
from pathlib import Path

from pages import ROOT, code_key

KERNELS = ('train', 'infer', 'blend')
FILE = ROOT/'docs'/'outputs.json'


def main(demo=ROOT/'runs'/'demo'):
    results = {}
    for name in KERNELS:
        cells = json.loads((Path(demo)/f'{name}.ipynb').read_text())['cells']
        shown = {code_key(cell): results_of(cell['outputs']) for cell in cells if cell['cell_type'] == 'code'}
        results[name] = {key: outputs for key, outputs in shown.items() if outputs}
    FILE.write_text(json.dumps(results, indent=0, ensure_ascii=False) + '\n')


def results_of(outputs):
    "The outputs that are for a reader, whoever ran it; printed lines are one output."
    printed, kept = '', []
    for output in outputs:
        if 'underdog doctor' in json.dumps(output): continue
        if output['output_type'] == 'stream': printed += ''.join(output['text'])
        else: kept.append(dict(data=output['data']))
    # a bar of progress is written over itself
    lines = [line + '\n' for line in printed.split('\n') if line.strip() and '\r' not in line and '\x1b' not in line]
    return [dict(text=''.join(lines)), *kept] if lines else kept


if __name__ == '__main__': main(*sys.argv[1:])
