"""Generated bad inputs of the command `underdog`: options, csv files, YAML, JSON, notebooks, run folders, odd files.

A `Case` is what a person could type, in a folder of its own; `outcome` runs it in this process and says what became of
it. `python tests/bad_inputs.py 0 1000` runs those seeds and prints what did not end in a message; a third argument
names one kind of case, `RUN` in the environment a finished run folder to damage, `SHOW` how much of each to print."""
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

NUMBERS = ['0', '-1', '1', '2', '.5', 'nan', 'inf', '-inf', '1e400', '1e15', '1e-300', '-0', str(2**31), str(2**63),
           str(2**64), '9'*400, '٣', '１２', '1_0', '0x10', '1,5', '', ' ', 'abc', 'True', '[1]', '1e6', '99999999']
TEXTS = ['', ' ', 'nan', '[/x]', '[red]', '$x$', '$\\frac{', '{a}', '..', '../..', '/', '~', '-', '--', 'a,b', ',', ':',
         '4:', '\udce9t\udce9', 'x'*300, 'x'*5000, 'a\nb', 'a\tb', '☃', '\u202e', '1', 'None', "'", '"', '`id`', '%s',
         '*', 'q_proj']
LEAVES = [None, True, False, 0, 1, -1, 2**64, 10**400, .5, 1e-5, 1e308, float('inf'), float('nan'), '', 'x', 'lr',
          '1e-4', [], {}, [1], {'a': 1}, [None], [[1]], [{}], '2020-01-01', 'joint', 'nf4', 3, 16]
# what YAML and JSON readers stumble over
DEEP = ['['*100_000, '{"a":'*50_000, '['*3000 + ']'*3000, '&a [*a]', 'a: &a {b: *a}', '*x',
        '!!python/object:os.system x', '? [1, 2]\n: 3', '- - - - 1', '%YAML 9', '\0', '1: 2', 'null', '~', '[]', 'x',
        'space: {lr: {low: 1, high: 2}, lr: 3}', 'space: {? {} : 1}', 'space: {1: [2]}', '{space: {null: [1]}}',
        'trials: 0o17', 'space: 2001-01-01', 'space: !!binary aGk=', 'space: {lr: !!set {a, b}}',
        'space: {lr: [.nan, .inf]}', 'space: {lr: {low: 1e-5, high: .inf}}']
ODD_NAMES = ['[/b]', 'caf\udce9', '{a}', '$x$', 'a b', "it's", '☃', '-x', '\\', '%s', 'a\nb']


# ---- contents: something small, then something else in its place
def leaf(rng): return rng.choice(LEAVES)


def tree(rng, depth=2):
    "Anything JSON or YAML can say."
    kind = rng.random()
    if depth == 0 or kind < .6: return leaf(rng)
    if kind < .8: return [tree(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    names = ['lr', 'rank', 'low', 'high', 'log', 'a', 'state', 'x']
    return {rng.choice(names): tree(rng, depth - 1) for _ in range(rng.randint(0, 3))}


def changed(rng, value, times=1):
    "`value` (nested dicts and lists) with something in it replaced, removed or added."
    if times > 1: return changed(rng, changed(rng, value, times - 1))
    if isinstance(value, dict) and value and rng.random() < .85:
        key, how = rng.choice(sorted(value, key=str)), rng.random()
        if how < .15: return {k: v for k, v in value.items() if k != key}
        if how < .25: return value | {rng.choice(['x', 'space', 'low', 'a', '[/b]']): tree(rng)}
        return value | {key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < .7:
        i = rng.randrange(len(value))
        return value[:i] + [changed(rng, value[i])] + value[i + 1:]
    return tree(rng)


def torn(rng, content):
    "Bytes cut, overwritten, in another encoding or filled up."
    how, at = rng.random(), rng.randrange(len(content) + 1)
    noise = lambda n: bytes(rng.randrange(256) for _ in range(n))
    if how < .3: return content[:at]
    if how < .6: return content[:at] + noise(rng.randint(1, 6)) + content[at + rng.randint(0, 6):]
    if how < .7:
        encoding = rng.choice(['utf-16', 'utf-32', 'utf-16-le', 'utf-8-sig', 'utf-32-be'])
        return content.decode('utf-8', 'replace').encode(encoding)
    if how < .75: return content + b'\0'*rng.randint(1, 50)
    if how < .8: return noise(rng.randint(0, 300))
    if how < .85: return content.replace(b'1', rng.choice(['１', '٣', '1_0', '1e999', 'nan', '-1', '"']).encode())
    if how < .9: return content.replace(b',', rng.choice([b';', b'\t', b',,', b'","']))
    return content.replace(b'\n', rng.choice([b'\r', b'\r\n', b'\n\n', b'', b'\n"']))


def put(rng, path, content):
    "A file with this content, or something else in its place; its name."
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = rng.random()
    if kind < .86: path.write_bytes(content)
    elif kind < .88: pass
    elif kind < .9: path.mkdir()
    elif kind < .93: os.mkfifo(path)
    else: path.symlink_to(rng.choice([path.name, '/dev/null', '/dev/zero', 'nowhere']))
    return path.name


def csv_text(rng, labelled=True, rows=None):
    "A small competition file as it should be."
    labels = ',winner_model_a,winner_model_b,winner_tie' if labelled else ''
    lines = [f'id,model_a,model_b,prompt,response_a,response_b{labels}']
    for i in range(rows or rng.randint(6, 12)):
        cells = ','.join(f'"[""{text} {i}""]"' for text in ('why', 'yes it is', 'no'))
        label = (',1,0,0', ',0,1,0', ',0,0,1')[i % 3] if labelled else ''
        lines.append(f'{i},m,n,{cells}{label}')
    return '\n'.join(lines) + '\n'


ODD_CELLS = ['"[1]"', '"[]"', '"{}"', 'null', '"' + '['*9000 + '"']


def csv_bytes(rng, **more):
    "A competition file that is torn, or has one odd cell."
    content = csv_text(rng, **more)
    if rng.random() < .7: return torn(rng, content.encode()) if rng.random() < .8 else content.encode()
    lines = content.split('\n')
    i = rng.randrange(len(lines))
    cells = lines[i].split(',')
    odd = [text.encode('utf-8', 'replace').decode() for text in NUMBERS + TEXTS[:20]]
    cells[rng.randrange(len(cells))] = rng.choice(odd + ODD_CELLS)
    lines[i] = ','.join(cells)
    return '\n'.join(lines).encode()


SAMPLE = 'id,winner_model_a,winner_model_b,winner_tie\n' + ''.join(f'{i},.2,.3,.5\n' for i in range(4))
SWEEP = dict(kernel='k.ipynb', search='tpe', trials=2, seed=0, fixed=dict(nap=.1), prune=False,
             space=dict(lr=dict(low=1e-5, high=1e-2, log=True), rank=[4, 8]))
SWEPT = ['lr', 'rank', 'seed', 'epochs', 'head', 'targets', 'share', 'tta', 'out', 'time_limit', 'best_possible']


def odd_choice(rng):
    "What may stand in the space of a sweep."
    return rng.choice([
        [leaf(rng), leaf(rng)],
        dict(low=leaf(rng), high=leaf(rng), log=leaf(rng)),
        dict(low=1e-5, high=leaf(rng)),
        dict(low=0, high=10**rng.randint(0, 400)),
        [leaf(rng)]])


def sweep_bytes(rng):
    "A sweep.yaml of any shape."
    import yaml
    kind = rng.random()
    if kind < .2: return rng.choice(DEEP).encode()
    if kind < .36: return torn(rng, yaml.safe_dump(SWEEP).encode())
    value = SWEEP | dict(kernel=rng.choice(['k.ipynb', 'k.ipynb', 'train', 'infer', 'blend']))
    if rng.random() < .3: value |= dict(search=rng.choice(['grid', 'random']))
    if rng.random() < .3: value |= dict(space={rng.choice(SWEPT): odd_choice(rng) for _ in range(rng.randint(1, 2))})
    else: value = changed(rng, value, rng.randint(1, 2))
    return yaml.safe_dump(value).encode()


JOURNALS = [b'x', b'{}\n', b'[]\n', b'null\n', b'1\n', b'\xff\xfe\n', b'{"a": 1', b'['*99999 + b'\n',
            b'{"op_code": 0}\n', b'{"op_code": 99, "worker_id": "a"}\n',
            b'{"op_code": 0, "worker_id": "w", "study_name": 1, "directions": [9]}\n']
JOURNAL = dict(op_code=0, worker_id='w', study_name='sweep', directions=[1])
CONFIG = dict(model_type='llama', num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=512)


def record_bytes(rng, record, deep=.12, tear=.12):
    "A JSON file that holds `record`, changed."
    kind = rng.random()
    if kind < deep: return rng.choice(DEEP).encode()
    content = json.dumps(changed(rng, record, rng.randint(1, 3))).encode()
    return torn(rng, content) if kind < deep + tear else content


CELLS = [   # of parameters; the first is as it should be
    "lr = 1e-4\nrank = 8\nnap = 0.0\nout = 'run'",
    'lr = ', 'lr = f(1)', 'lr, rank = 1, 2', 'lr = rank = 1', 'lr: float = 1', 'lr += 1', 'import os', 'x.y = 1',
    'x[0] = 1', 'lr = 1e-4 if 1 else 2', 'lr = -1\nlr = 2', 'lr = (1, 2)', 'lr = [1, 2]', 'lr = {1: 2}', "lr = b'x'",
    'lr = ...', 'lr = 1j', 'lr = {*()}', 'lr = ' + '('*300 + ')'*300, 'lr = ' + '-'*5000 + '1', 'lr = 1\0', '\tlr = 1',
    'lr = "\ud800"', 'lr = 1e999', 'lr = ' + '9'*5000, '', '#', '"""', '%magic', '!ls', 'lr = 1;rank = 2',
    'lr = [[1], {"a": {1, 2}}]', 'lr = None', 'lr = True', 'lr = "x" "y"', 'lr = __import__("os").getcwd()',
    'lr = 2**99', 'lr = 1 + 2', 'def f(): pass', 'lr = {[]: 1}', 'lr = {[]}']
GOOD_NOTEBOOK = CELLS[0]


def notebook(cell=GOOD_NOTEBOOK):
    "The JSON of a notebook with this parameters cell."
    def code(source, *tags):
        return dict(cell_type='code', id=f'abc{len(source)}', metadata=dict(tags=list(tags)), source=source,
                    outputs=[], execution_count=None)
    kernelspec = dict(name='python3', display_name='P', language='python')
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernelspec),
                cells=[code(cell, 'parameters'), code('print(lr)')])


def notebook_bytes(rng):
    "A notebook with any parameters cell, perhaps changed or torn."
    nb = notebook(rng.choice(CELLS))
    if rng.random() < .4: nb = changed(rng, nb, rng.randint(1, 3))
    content = json.dumps(nb).encode()
    return torn(rng, content) if rng.random() < .15 else content


T4 = dict(name='T4', memory_gib=14.7, copy_gbs=200., products=dict(float16=dict(first=30., last=20.)))
PROBE = dict(format=1, made='2026-01-01 00:00', build='x', log='y', parts=dict(
    machine=dict(state='measured', image_commit=None, image_built=None, python='3.12', cores=2, memory_gib=8., cpu='c',
                 seconds=1.),
    driver=dict(state='not measured', why='none', seconds=0.),
    image=dict(state='measured', current=dict(recorded='r', packages=3, differ={'a': ['1', '2']}),
               next=dict(recorded='r', packages=3, differ={}), seconds=1.),
    devices=dict(state='measured', devices=[T4], seconds=1.),
    all_reduce=dict(state='failed', why='x', seconds=1.),
    attention=dict(state='measured', passed=True, lines={'64': 'ok'}, seconds=1.)))
TABLE = ('name,cards,memory_gib,bandwidth_gbs,nominal_tflops,sustained_tflops,bf16,price_usd,priced,supported,note\n'
         'Mine,1,16,300,65,24,no,,x,yes,y\n')


# ---- what may be typed
@dataclass
class Case:
    "A command with its folder; `folder` is filled by who makes the case."
    folder: Path
    args: list = field(default_factory=list)


def options(rng, **names):
    "Some options of these names, each with one of its values."
    return [f"--{name.replace('_', '-')}={rng.choice(values)}" for name, values in names.items() if rng.random() < .35]


def parameters(rng, most=3):
    "Up to so many `-p` options."
    values = NUMBERS + TEXTS
    return [x for _ in range(rng.randint(0, most)) for x in ('-p', f'{rng.choice(PARAMETERS)}={rng.choice(values)}')]


def case_check(rng, c):
    command = rng.choice(['check', 'check', 'floors'])
    name = rng.choice(['t.csv', 't.csv', 't.csv', 't.parquet', 't', *(f'{odd}.csv' for odd in ODD_NAMES[:2])])
    put(rng, c.folder/name, csv_bytes(rng))
    c.args = [command, name, *options(rng, competition=[*TEXTS, 'wsdm', 'lmsys'])]
    if command == 'floors': c.args += options(rng, folds=NUMBERS)
    if rng.random() < .2: c.args.append('--json')


def case_submission(rng, c):
    put(rng, c.folder/'s.csv', torn(rng, SAMPLE.encode()) if rng.random() < .8 else SAMPLE.encode())
    put(rng, c.folder/'sample.csv', torn(rng, SAMPLE.encode()) if rng.random() < .3 else SAMPLE.encode())
    c.args = ['submission', 's.csv', '--sample', 'sample.csv',
              *options(rng, competition=[*TEXTS[:6], 'wsdm', 'lmsys'])]


def case_plan(rng, c):
    put(rng, c.folder/'config.json', record_bytes(rng, CONFIG))
    known = ['./config.json', './config.json', './', 'gemma-2-9b', 'deberta-v3-large', 'gemma-2-9b']
    c.args = ['plan', rng.choice([*known, *TEXTS])]
    if rng.random() < .2: c.args.append(put(rng, c.folder/'t.csv', csv_bytes(rng)))
    if rng.random() < .15: c.args += ['--calibrated', put(rng, c.folder/'probe.json', record_bytes(rng, PROBE))]
    if rng.random() < .15:
        table = torn(rng, TABLE.encode()) if rng.random() < .6 else TABLE.replace('16', rng.choice(NUMBERS)).encode()
        c.args += ['--on', rng.choice(['Mine', 'T4']), '--accelerators', put(rng, c.folder/'a.csv', table)]
    c.args += options(rng, on=['T4', '2xT4', *TEXTS[:9]], head=['joint', *TEXTS[:6]], max_length=NUMBERS, rank=NUMBERS,
                      quantization=['none', 'int8', 'x'], epochs=NUMBERS, rows=NUMBERS, test_rows=NUMBERS,
                      efficiency=NUMBERS, hours=NUMBERS)
    if rng.random() < .2: c.args.append('--json')


def case_sweep(rng, c):
    name = rng.choice(['s.yaml', 's.yaml', *(f'{odd}.yaml' for odd in ODD_NAMES[:2])])
    good = rng.random() < .9
    (c.folder/'k.ipynb').write_bytes(json.dumps(notebook()).encode() if good else notebook_bytes(rng))
    put(rng, c.folder/name, sweep_bytes(rng))
    if rng.random() < .2:
        changed_journal = json.dumps(changed(rng, JOURNAL)).encode() + b'\n'
        put(rng, c.folder/'out'/'journal.log', rng.choice([*JOURNALS, changed_journal]))
    out = rng.choice(['out', 'out', '[/b]', '$x$', 'k.ipynb', '{a}', 'a/b/c', 'x'*300, ''])
    c.args = ['sweep', name, '--out', out, *options(rng, hours=NUMBERS)]


PARAMETERS = [
    'train_csv', 'model', 'out', 'competition', 'head', 'max_length', 'template', 'prompt_share', 'quantization',
    'dtype', 'layers', 'rank', 'alpha', 'dropout', 'targets', 'lora_layers', 'liger', 'pooling', 'share', 'epochs',
    'batch_rows', 'batch_tokens', 'checkpointing', 'lr', 'head_lr', 'weight_decay', 'warmup', 'max_grad_norm', 'orders',
    'start', 'probe_rows', 'n_folds', 'fold', 'evaluations', 'eval_rows', 'log_every', 'seed', 'processes', 'machines',
    'rendezvous', 'time_limit', 'save_minutes', 'resume_from', 'restart', 'run', 'test_csv', 'tta', 'base', 'merge',
    'submission', 'runs', 'predictions', 'best_possible', 'sweep', 'steps', 'seconds', 'xyz', '', '=']


def case_run(rng, c):
    c.args = [rng.choice(['run', 'run', 'run', 'doctor'])]
    # a notebook of one's own
    if rng.random() < .4:
        name = rng.choice(['k.ipynb', *(f'{odd}.ipynb' for odd in ODD_NAMES[:3])])
        put(rng, c.folder/name, notebook_bytes(rng))
        c.args.append(name)
        if rng.random() < .6: c.args += ['-p', f"{rng.choice(['lr', 'rank', 'x'])}={rng.choice(NUMBERS + TEXTS)}"]
        if c.args[0] == 'run' and rng.random() < .3: c.args.append('--list')
        return
    # one of ours
    c.args.append(rng.choice(['train', 'train', 'train', 'infer', 'blend', 'probe', 'sweep', 'wheels', *TEXTS[:12]]))
    (c.folder/'config.json').write_bytes(record_bytes(rng, CONFIG))
    put(rng, c.folder/'t.csv', csv_bytes(rng))
    c.args += parameters(rng)
    if rng.random() < .7: c.args += ['-p', 'train_csv=t.csv', '-p', 'model=.']
    if rng.random() < .2: c.args += ['--out', rng.choice([*TEXTS, 't.csv', 't.csv/x', '/proc/x', '/dev/null'])]


def case_doctor(rng, c):
    put(rng, c.folder/'probe.json', record_bytes(rng, PROBE))
    target = rng.choice(['probe.json', 'probe.json', 'probe.json', *TEXTS])
    c.args = ['doctor', target, *options(rng, gpus=NUMBERS, out=TEXTS)]
    if rng.random() < .3: c.args.append('--json')


RUN = None   # a finished run folder to damage; set by who has one


def damaged_run(rng, folder):
    "A copy of `RUN` at `folder` with one or two files spoiled; an empty folder where there is none."
    if RUN is None: return folder.mkdir(parents=True)
    shutil.copytree(RUN, folder)
    if rng.random() < .15: return
    for _ in range(rng.randint(1, 2)):
        files = sorted(f for f in folder.rglob('*') if f.is_file() and not f.is_symlink())
        if not files: return
        file = rng.choice([f for f in files if f.suffix in ('.json', '.parquet', '.jsonl')] or files)
        content = file.read_bytes()
        file.unlink()
        if file.suffix == '.json' and rng.random() < .8: content = record_bytes(rng, _record(content), 0, 0)
        else: content = torn(rng, content)
        put(rng, file, content)


def _record(content):
    try: record = json.loads(content)
    except (ValueError, RecursionError): return {}
    return record if isinstance(record, dict) else {}


def case_scale(rng, c):
    for i in range(rng.randint(0, 3)): damaged_run(rng, c.folder/'runs'/f'{i}')
    c.args = [rng.choice(['scale', 'scale', 'doctor']), rng.choice(['runs', 'runs/0', 'runs', *TEXTS[:9]])]
    if c.args[0] == 'doctor': return
    c.args += options(rng, at=NUMBERS, by=['rows', 'steps', 'x'], batch=NUMBERS,
                      out=['o', 'runs/0/config.json', '[/b]'])
    if rng.random() < .3: c.args.append('--json')


def case_finished(rng, c):
    "What is done with finished runs."
    names = [f'runs/{name}' for name in ('0', *rng.sample(ODD_NAMES, 2))]
    for name in names: damaged_run(rng, c.folder/name)
    one, command = rng.choice([*names, *TEXTS[:9]]), rng.choice(['compare', 'try', 'export'])
    if command == 'compare':
        pages = ['o.html', 'runs', '[/b].html', '\udce9', '']
        c.args = ['compare', *names[:rng.randint(1, 3)], *options(rng, out=pages)]
        if rng.random() < .3: c.args.append('--json')
    elif command == 'try':
        c.args = ['try', one, f'--prompt={rng.choice(TEXTS)}', f'--a={rng.choice(TEXTS)}', f'--b={rng.choice(TEXTS)}',
                  *options(rng, base=TEXTS)]
    else:
        c.args = ['export', one, *options(rng, out=['o', 'runs', 'runs/0', '[/b]', '\udce9', ''], base=TEXTS)]
        if rng.random() < .3: c.args.append('--merged')


MAGIC = [b'\x93NUMPY\x01\0', b'PK\x03\x04', b'\x80\x04', b'\x1f\x8b\x08', b'BZh', bytes(8) + b'{}']


def case_remote(rng, c):
    "What talks to Kaggle."
    kernel = rng.choice(['train', 'infer', 'k.ipynb', *TEXTS[:9]])
    put(rng, c.folder/'k.ipynb', notebook_bytes(rng))
    command = rng.choice(['push', 'relay', 'submit', 'probe', 'bundle', 'status', 'logs', 'pull', 'check-account'])
    c.args, pushed = [command], parameters(rng, 2)
    if command == 'push':
        c.args += [kernel, *pushed, *options(rng, slug=TEXTS, timeout=NUMBERS, gpus=NUMBERS, shape=TEXTS, poll=NUMBERS,
                                             source=TEXTS, docker_image=TEXTS, folder=['new', 'k.ipynb', *TEXTS[:9]])]
        if rng.random() < .5: c.args.append('--dry-run')
    elif command == 'relay': c.args += [kernel, *pushed, *options(rng, name=TEXTS, hours=NUMBERS, poll=NUMBERS)]
    elif command == 'submit':
        c.args += [*pushed, *options(rng, competition=TEXTS, kernel=TEXTS, sample=TEXTS, slug=TEXTS)]
    elif command == 'probe': c.args += [*pushed, *options(rng, timeout=NUMBERS, gpus=NUMBERS, shape=TEXTS)]
    elif command == 'check-account': c.args += options(rng, competition=TEXTS, model=TEXTS)
    elif command == 'bundle':
        put(rng, c.folder/'d'/'a.bin', torn(rng, b'x'*300))
        names = ['b\udce9.txt', 'b.safetensors', 'b.npy', 'b.zip', '.env', 'sub/[/x].txt']
        put(rng, c.folder/'d'/rng.choice(names), torn(rng, rng.choice(MAGIC)*20))
        c.args += ['--dry-run', '--folder', rng.choice(['d', 'd', 'd', 'd/a.bin', *TEXTS[:6]])]
    else:
        more = dict(status=dict(last=NUMBERS), logs={}, pull=dict(out=TEXTS, pattern=TEXTS))[command]
        c.args += [rng.choice(TEXTS), *options(rng, **more)]
    if command in ('push', 'relay', 'submit', 'probe') and rng.random() < .8: c.args.append('--no-wheels')


def case_show(rng, c):
    put(rng, c.folder/'t.csv', csv_bytes(rng))
    for name in ('tokenizer.json', 'config.json'): put(rng, c.folder/'m'/name, record_bytes(rng, CONFIG))
    c.args = ['show', 't.csv', '--model', rng.choice(['m', 'm', *TEXTS[:8]]),
              *options(rng, row=NUMBERS, head=['joint', 'x'], max_length=NUMBERS)]


def case_demo(rng, c):
    put(rng, c.folder/'t.csv', csv_bytes(rng))
    files = ['t.csv', *TEXTS[:5]]
    c.args = ['demo', *options(rng, out=[*TEXTS[:14], 't.csv'], seed=NUMBERS, train=files, test=files)]


MAKERS = dict(check=case_check, submission=case_submission, plan=case_plan, sweep=case_sweep, run=case_run,
              doctor=case_doctor, scale=case_scale, finished=case_finished, remote=case_remote, show=case_show,
              demo=case_demo)


def attack(rng, folder, only=None):
    "A `Case` in `folder`."
    case = Case(Path(folder))
    MAKERS[only or rng.choice(sorted(MAKERS))](rng, case)
    return case


# ---- what becomes of them
class Hang(BaseException):
    "A command that takes longer than it may."


class Started(Exception):
    "A kernel, a training or a talk with Kaggle would begin here: every check is over."


@contextlib.contextmanager
def stand_ins(account=False):
    "While it lasts nothing long is begun: no Jupyter, no training, no network; no Kaggle unless there is an `account`."
    from underdog.core import UserError
    from underdog.search.trials import _tell

    def start(*args, **kwargs): raise Started

    def no_account(): raise UserError('no Kaggle credentials')

    def pretend(trial_run, turn, end=0):
        trial_run.trial.set_user_attr('curve', [.5])
        _tell(trial_run, 'complete', [.5 + trial_run.trial.number/10])
        return 'complete'

    replaced = {
        'papermill.execute_notebook': start,
        'underdog.search.trials.run_trial': pretend,
        'underdog.console.doctor.imports_offline': lambda: [],
        'underdog.console.demo.smollm2': lambda: Path('.'),
    }
    if not account: replaced['underdog.kaggle.account._client'] = no_account
    with contextlib.ExitStack() as held:
        for target, stand_in in replaced.items(): held.enter_context(patch(target, stand_in))
        yield


class Terminal(io.TextIOWrapper):
    "What a terminal is: it takes what can be encoded, and nothing else."
    def __init__(self, errors='strict'): super().__init__(io.BytesIO(), 'utf-8', errors)

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode()


def outcome(case, limit=10):
    "(kind, text, files left) of a case: ok, started, message, usage, traceback or hang."
    from underdog.console.main import main

    def late(*_): raise Hang

    before, here = set(case.folder.rglob('*')), os.getcwd()
    out, err = Terminal(), Terminal('backslashreplace')
    handler = signal.signal(signal.SIGALRM, late)
    os.chdir(case.folder)
    signal.setitimer(signal.ITIMER_REAL, limit)
    text = ''
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): main(case.args)
        kind = 'ok'
    except SystemExit as e: kind = {0: 'ok', None: 'ok', 1: 'message', 2: 'usage'}.get(e.code, f'exit {e.code}')
    except Started: kind = 'started'
    except Hang: kind, text = 'hang', where()
    except BaseException: kind, text = 'traceback', where()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(here)
    new = sorted(set(case.folder.rglob('*')) - before)
    return kind, text or out.text() + err.text(), [str(f.relative_to(case.folder)) for f in new]


def where():
    "The error, and the last lines of ours on the way to it."
    kind, error, tb = sys.exc_info()
    frames = [f for f in traceback.extract_tb(tb) if '/underdog/' in f.filename]
    ours = [f'{Path(f.filename).name}:{f.lineno} {f.name}' for f in frames[-3:]]
    return f"{kind.__name__}: {str(error)[:150]} at {' > '.join(ours)}"


def wrong(kind, text, left):
    "What is wrong with an outcome, '' if nothing."
    if kind in ('traceback', 'hang') or kind.startswith('exit'): return f'{kind}: {text}'
    if any(Path(f).name.endswith('.tmp') for f in left): return f'half-written: {left}'
    if kind != 'message': return ''
    if 'Traceback' in text or ('underdog:' not in text and 'Error' not in text): return f'no message: {text[-300:]}'
    return f'long message {len(text)}: {text[:200]}' if len(text) > 6000 else ''


# ---- many of them
LATE = ('underdog.console.run_doctor', 'underdog.search.trials', 'transformers.models.auto', 'optuna',
        'sklearn.linear_model', 'matplotlib.figure')   # what is loaded on first use counts for nobody


def used_s(): return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def besiege(seeds, only=None, show=0):
    "Run the cases of these seeds; prints counts, faults and the slowest."
    kinds, faults, slow = Counter(), defaultdict(list), []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            case = attack(random.Random(seed), folder, only)
            began = used_s()
            kind, text, left = outcome(case)
            slow.append((round(used_s() - began, 1), seed, case.args))
        kinds[kind] += 1
        if kind in ('message', 'usage') and left: kinds[f'{kind}, files left'] += 1
        bad = wrong(kind, text, left)
        if bad: faults[bad.split(' at ')[-1] if ' at ' in bad else bad[:60]].append((seed, bad, case.args))
        if show: print(seed, kind, repr(case.args)[:150], '|', repr(text[-show:].strip()), '|', left[:4])
    print(dict(kinds))
    for cases in sorted(faults.values(), key=len, reverse=True):
        seed, bad, args = cases[0]
        print(f'{len(cases):4} {bad[:420]}\n       seed {seed}: {repr(args)[:200]}')
    for row in sorted(slow, key=lambda row: -row[0])[:8]:
        if row[0] > 2: print('slow', repr(row)[:200])


if __name__ == '__main__':
    first, last, *kind = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
    for module in LATE: import_module(module)
    RUN = os.environ.get('RUN')
    with stand_ins(): besiege(range(int(first), int(last)), *kind, show=int(os.environ.get('SHOW', 0)))
