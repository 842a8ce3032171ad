"""Generated bad inputs of the command `underdog`: options, csv files, YAML, JSON, notebooks, run folders, odd files.

A `Case` is what a person could type, in a folder of its own; `outcome` runs it in this process and says what became of
it. `python tests/bad_inputs.py 1000` runs so many and prints what did not end in a message."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

NUMBERS = [
    '0',
    '-1',
    '1',
    '2',
    '.5',
    'nan',
    'inf',
    '-inf',
    '1e400',
    '1e15',
    '1e-300',
    '-0',
    str(2**31),
    str(2**63),
    str(2**64),
    '9' * 400,
    '٣',
    '１２',
    '1_0',
    '0x10',
    '1,5',
    '',
    ' ',
    'abc',
    'True',
    '[1]',
    '1e6',
    '99999999',
]
TEXTS = [
    '',
    ' ',
    'nan',
    '[/x]',
    '[red]',
    '$x$',
    '$\\frac{',
    '{a}',
    '..',
    '../..',
    '/',
    '~',
    '-',
    '--',
    'a,b',
    ',',
    ':',
    '4:',
    '\udce9t\udce9',
    'x' * 300,
    'x' * 5000,
    'a\nb',
    'a\tb',
    '☃',
    '\u202e',
    '1',
    'None',
    "'",
    '"',
    '`id`',
    '%s',
    '*',
    'q_proj',
]
LEAVES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**64,
    10**400,
    0.5,
    1e-5,
    1e308,
    float('inf'),
    float('nan'),
    '',
    'x',
    'lr',
    '1e-4',
    [],
    {},
    [1],
    {'a': 1},
    [None],
    [[1]],
    [{}],
    '2020-01-01',
    'joint',
    'nf4',
    3,
    16,
]


def leaf(rng):
    return rng.choice(LEAVES)


def tree(rng, depth=2):
    "Anything JSON or YAML can say."
    kind = rng.random()
    if depth == 0 or kind < 0.6:
        return leaf(rng)
    if kind < 0.8:
        return [tree(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {
        rng.choice(['lr', 'rank', 'low', 'high', 'log', 'a', 'state', 'x']): tree(rng, depth - 1)
        for _ in range(rng.randint(0, 3))
    }


def changed(rng, value, times=1):
    "`value` (nested dicts and lists) with something in it replaced, removed or added."
    if times > 1:
        return changed(rng, changed(rng, value, times - 1))
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value, key=str))
        rest = {k: v for k, v in value.items() if k != key}
        how = rng.random()
        if how < 0.15:
            return rest
        if how < 0.25:
            return value | {rng.choice(['x', 'space', 'low', 'a', '[/b]']): tree(rng)}
        return value | {key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return value[:i] + [changed(rng, value[i])] + value[i + 1 :]
    return tree(rng)


def torn(rng, content):
    "Bytes cut, overwritten or filled up."
    how = rng.random()
    at = rng.randrange(len(content) + 1)
    if how < 0.3:
        return content[:at]
    if how < 0.6:
        return (
            content[:at]
            + bytes(rng.randrange(256) for _ in range(rng.randint(1, 6)))
            + content[at + rng.randint(0, 6) :]
        )
    if how < 0.7:
        return content.decode('utf-8', 'replace').encode(
            rng.choice(['utf-16', 'utf-32', 'utf-16-le', 'utf-8-sig', 'utf-32-be'])
        )
    if how < 0.75:
        return content + b'\0' * rng.randint(1, 50)
    if how < 0.8:
        return bytes(rng.randrange(256) for _ in range(rng.randint(0, 300)))
    if how < 0.85:
        return content.replace(b'1', rng.choice(['１', '٣', '1_0', '1e999', 'nan', '-1', '"']).encode())
    if how < 0.9:
        return content.replace(b',', rng.choice([b';', b'\t', b',,', b'","']))
    return content.replace(b'\n', rng.choice([b'\r', b'\r\n', b'\n\n', b'', b'\n"']))


def deep(rng):
    return rng.choice(
        [
            '[' * 100_000,
            '{"a":' * 50_000,
            '[' * 3000 + ']' * 3000,
            '&a [*a]',
            'a: &a {b: *a}',
            '*x',
            '!!python/object:os.system x',
            '? [1, 2]\n: 3',
            '- - - - 1',
            '%YAML 9',
            'space: {lr: {low: 1, high: 2}, lr: 3}',
            'space: {? {} : 1}',
            '\0',
            '1: 2',
            'null',
            '~',
            '[]',
            'x',
            'space: {1: [2]}',
            '{space: {null: [1]}}',
            'trials: 0o17',
            'space: 2001-01-01',
            'space: !!binary aGk=',
            'space: {lr: !!set {a, b}}',
            'space: {lr: [.nan, .inf]}',
            'space: {lr: {low: 1e-5, high: .inf}}',
        ]
    )


def put(rng, path, content):
    "A file with this content, or something else in its place."
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = rng.random()
    if kind < 0.86:
        path.write_bytes(content)
    elif kind < 0.88:
        pass
    elif kind < 0.90:
        path.mkdir()
    elif kind < 0.93:
        os.mkfifo(path)
    elif kind < 0.95:
        path.symlink_to(path.name)
    elif kind < 0.97:
        path.symlink_to('/dev/null')
    elif kind < 0.98:
        path.symlink_to('/dev/zero')
    else:
        path.symlink_to('nowhere')
    return path.name


# ---- contents
def csv_text(rng, labelled=True, rows=None):
    "A small competition file as it should be."
    n = rows or rng.randint(6, 12)
    lines = [
        'id,model_a,model_b,prompt,response_a,response_b'
        + (',winner_model_a,winner_model_b,winner_tie' if labelled else '')
    ]
    for i in range(n):
        cells = ['"[' + f'""{t} {i}""' + ']"' for t in ('why', 'yes it is', 'no')]
        label = ',1,0,0' if i % 3 == 0 else ',0,1,0' if i % 3 == 1 else ',0,0,1'
        lines.append(f'{i},m,n,' + ','.join(cells) + (label if labelled else ''))
    return '\n'.join(lines) + '\n'


def csv_bytes(rng, **kw):
    content = csv_text(rng, **kw).encode()
    if rng.random() < 0.3:
        lines = content.decode().split('\n')
        i = rng.randrange(len(lines))
        cells = lines[i].split(',')
        cells[rng.randrange(len(cells))] = rng.choice(
            [t.encode('utf-8', 'replace').decode() for t in NUMBERS + TEXTS[:20]]
            + ['"[1]"', '"[]"', '"{}"', 'null', '"' + '[' * 9000 + '"']
        )
        lines[i] = ','.join(cells)
        return '\n'.join(lines).encode()
    return torn(rng, content) if rng.random() < 0.8 else content


SAMPLE = 'id,winner_model_a,winner_model_b,winner_tie\n' + ''.join(f'{i},.2,.3,.5\n' for i in range(4))
SWEEP = dict(
    kernel='k.ipynb',
    search='tpe',
    trials=2,
    seed=0,
    fixed=dict(nap=0.1),
    prune=False,
    space=dict(lr=dict(low=1e-5, high=1e-2, log=True), rank=[4, 8]),
)


def sweep_bytes(rng):
    import yaml

    if rng.random() < 0.2:
        return deep(rng).encode()
    if rng.random() < 0.2:
        return torn(rng, yaml.safe_dump(SWEEP).encode())
    value = SWEEP | dict(kernel=rng.choice(['k.ipynb', 'k.ipynb', 'train', 'infer', 'blend']))
    if rng.random() < 0.3:
        value |= dict(search=rng.choice(['grid', 'random']))
    if rng.random() < 0.3:
        names = [
            'lr',
            'rank',
            'seed',
            'epochs',
            'head',
            'targets',
            'share',
            'tta',
            'out',
            'time_limit',
            'best_possible',
        ]
        value |= dict(
            space={
                rng.choice(names): rng.choice(
                    [
                        [leaf(rng), leaf(rng)],
                        dict(low=leaf(rng), high=leaf(rng), log=leaf(rng)),
                        dict(low=1e-5, high=leaf(rng)),
                        dict(low=0, high=10 ** rng.randint(0, 400)),
                        [leaf(rng)],
                    ]
                )
                for _ in range(rng.randint(1, 2))
            }
        )
    else:
        value = changed(rng, value, rng.randint(1, 2))
    return yaml.safe_dump(value).encode()


CONFIG = dict(
    model_type='llama',
    num_hidden_layers=4,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)


def config_bytes(rng):
    if rng.random() < 0.15:
        return deep(rng).encode()
    if rng.random() < 0.2:
        return torn(rng, json.dumps(CONFIG).encode())
    value = changed(rng, CONFIG, rng.randint(1, 3))
    return json.dumps(value).encode()


CELLS = [
    "lr = 1e-4\nrank = 8\nnap = 0.0\nout = 'run'",
    'lr = ',
    'lr = f(1)',
    'lr, rank = 1, 2',
    'lr = rank = 1',
    'lr: float = 1',
    'lr += 1',
    'import os',
    'x.y = 1',
    'x[0] = 1',
    'lr = 1e-4 if 1 else 2',
    'lr = -1\nlr = 2',
    'lr = (1, 2)',
    'lr = [1, 2]',
    'lr = {1: 2}',
    "lr = b'x'",
    'lr = ...',
    'lr = 1j',
    'lr = {*()}',
    'lr = ' + '(' * 300 + ')' * 300,
    'lr = ' + '-' * 5000 + '1',
    'lr = 1\0',
    '\tlr = 1',
    'lr = "\ud800"',
    'lr = 1e999',
    'lr = ' + '9' * 5000,
    '',
    '#',
    '"""',
    '%magic',
    '!ls',
    'lr = 1;rank = 2',
    'lr = [[1], {"a": {1, 2}}]',
    'lr = None',
    'lr = True',
    'lr = "x" "y"',
    'lr = __import__("os").getcwd()',
    'lr = 2**99',
    'lr = 1 + 2',
    'def f(): pass',
    'lr = {[]: 1}',
    'lr = {[]}',
]


def notebook_bytes(rng, cell=None):
    cell = rng.choice(CELLS) if cell is None else cell
    made = lambda source, tags=(): dict(
        cell_type='code',
        id='abc%d' % len(source),
        metadata=dict(tags=list(tags)),
        source=source,
        outputs=[],
        execution_count=None,
    )
    nb = dict(
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(name='python3', display_name='P', language='python')),
        cells=[made(cell, ['parameters']), made('print(lr)')],
    )
    if rng.random() < 0.4:
        nb = changed(rng, nb, rng.randint(1, 3))
    content = json.dumps(nb).encode()
    return torn(rng, content) if rng.random() < 0.15 else content


GOOD_NOTEBOOK = CELLS[0]
PROBE = dict(
    format=1,
    made='2026-01-01 00:00',
    build='x',
    log='y',
    parts=dict(
        machine=dict(
            state='measured',
            image_commit=None,
            image_built=None,
            python='3.12',
            cores=2,
            memory_gib=8.0,
            cpu='c',
            seconds=1.0,
        ),
        driver=dict(state='not measured', why='none', seconds=0.0),
        image=dict(
            state='measured',
            current=dict(recorded='r', packages=3, differ={'a': ['1', '2']}),
            next=dict(recorded='r', packages=3, differ={}),
            seconds=1.0,
        ),
        devices=dict(
            state='measured',
            devices=[
                dict(name='T4', memory_gib=14.7, copy_gbs=200.0, products=dict(float16=dict(first=30.0, last=20.0)))
            ],
            seconds=1.0,
        ),
        all_reduce=dict(state='failed', why='x', seconds=1.0),
        attention=dict(state='measured', passed=True, lines={'64': 'ok'}, seconds=1.0),
    ),
)


def probe_bytes(rng):
    if rng.random() < 0.1:
        return deep(rng).encode()
    value = changed(rng, PROBE, rng.randint(1, 3))
    content = json.dumps(value).encode()
    return torn(rng, content) if rng.random() < 0.1 else content


TABLE = (
    'name,cards,memory_gib,bandwidth_gbs,nominal_tflops,sustained_tflops,bf16,price_usd,priced,supported,note\n'
    'Mine,1,16,300,65,24,no,,x,yes,y\n'
)


# ---- what may be typed
@dataclass
class Case:
    "A command with its folder; `folder` is filled by who makes the case."

    folder: Path
    args: list = field(default_factory=list)


def option_of(rng, names):
    "Options of these names with odd values."
    args = []
    for name, values in names.items():
        if rng.random() < 0.35:
            args += [f'--{name}={rng.choice(values)}']
    return args


def case_check(rng, c):
    command = rng.choice(['check', 'check', 'floors'])
    name = rng.choice(['t.csv', 't.csv', 't.csv', 't.parquet', 't', 'caf\udce9.csv', '[/b].csv'])
    put(rng, c.folder / name, csv_bytes(rng))
    c.args = [command, name, *option_of(rng, dict(competition=[*TEXTS, 'wsdm', 'lmsys']))]
    if command == 'floors':
        c.args += option_of(rng, dict(folds=NUMBERS))


def case_submission(rng, c):
    put(rng, c.folder / 's.csv', torn(rng, SAMPLE.encode()) if rng.random() < 0.8 else SAMPLE.encode())
    put(rng, c.folder / 'sample.csv', torn(rng, SAMPLE.encode()) if rng.random() < 0.3 else SAMPLE.encode())
    c.args = [
        'submission',
        's.csv',
        '--sample',
        'sample.csv',
        *option_of(rng, dict(competition=[*TEXTS[:6], 'wsdm', 'lmsys'])),
    ]


def case_plan(rng, c):
    put(rng, c.folder / 'config.json', config_bytes(rng))
    model = rng.choice(['./config.json', './config.json', './', 'gemma-2-9b', 'deberta-v3-large', 'gemma-2-9b', *TEXTS])
    c.args = ['plan', model]
    if rng.random() < 0.2:
        c.args.append(put(rng, c.folder / 't.csv', csv_bytes(rng)))
    if rng.random() < 0.15:
        c.args += ['--calibrated', put(rng, c.folder / 'probe.json', probe_bytes(rng))]
    if rng.random() < 0.15:
        c.args += [
            '--on',
            rng.choice(['Mine', 'T4']),
            '--accelerators',
            put(
                rng,
                c.folder / 'a.csv',
                torn(rng, TABLE.encode()) if rng.random() < 0.6 else TABLE.replace('16', rng.choice(NUMBERS)).encode(),
            ),
        ]
    whole = [n for n in NUMBERS]
    c.args += option_of(
        rng,
        {
            'on': ['T4', '2xT4', *TEXTS[:9]],
            'head': ['joint', *TEXTS[:6]],
            'max-length': whole,
            'rank': whole,
            'quantization': ['none', 'int8', 'x'],
            'epochs': whole,
            'rows': whole,
            'test-rows': whole,
            'efficiency': whole,
        },
    )
    if rng.random() < 0.2:
        c.args.append('--json')


def case_sweep(rng, c):
    name = rng.choice(['s.yaml', 's.yaml', '[/b].yaml', 'caf\udce9.yaml'])
    (c.folder / 'k.ipynb').write_bytes(notebook_bytes(rng, GOOD_NOTEBOOK) if rng.random() < 0.1 else json_notebook())
    put(rng, c.folder / name, sweep_bytes(rng))
    out = rng.choice(['out', 'out', '[/b]', '$x$', 'k.ipynb', '{a}', 'a/b/c', 'x' * 300, ''])
    if rng.random() < 0.2:
        (c.folder / 'out').mkdir()
        put(
            rng,
            c.folder / 'out' / 'journal.log',
            rng.choice(
                [
                    b'x',
                    b'{}\n',
                    b'[]\n',
                    b'{"op_code": 0}\n',
                    b'{"op_code": 99, "worker_id": "a"}\n',
                    b'null\n',
                    b'1\n',
                    b'\xff\xfe\n',
                    b'{"op_code": 0, "worker_id": "w", "study_name": 1, "directions": [9]}\n',
                    b'[' * 99999 + b'\n',
                    b'{"a": 1',
                    json.dumps(
                        changed(rng, dict(op_code=0, worker_id='w', study_name='sweep', directions=[1]))
                    ).encode()
                    + b'\n',
                ]
            ),
        )
    c.args = ['sweep', name, '--out', out, *option_of(rng, dict(hours=NUMBERS))]


def json_notebook():
    import random

    rng = random.Random(0)
    while True:
        content = notebook_bytes(rng, GOOD_NOTEBOOK)
        try:
            nb = json.loads(content)
            if (
                nb['cells'][0]['source'] == GOOD_NOTEBOOK
                and nb['cells'][0]['metadata']['tags'] == ['parameters']
                and nb['nbformat'] == 4
                and nb['metadata']['kernelspec']['name'] == 'python3'
            ):
                return content
        except (ValueError, KeyError, TypeError, IndexError):
            pass


PARAMETERS = [
    'train_csv',
    'model',
    'out',
    'competition',
    'head',
    'max_length',
    'template',
    'prompt_share',
    'quantization',
    'dtype',
    'layers',
    'rank',
    'alpha',
    'dropout',
    'targets',
    'lora_layers',
    'liger',
    'pooling',
    'share',
    'epochs',
    'batch_rows',
    'batch_tokens',
    'checkpointing',
    'lr',
    'head_lr',
    'weight_decay',
    'warmup',
    'max_grad_norm',
    'orders',
    'start',
    'probe_rows',
    'n_folds',
    'fold',
    'evaluations',
    'eval_rows',
    'log_every',
    'seed',
    'processes',
    'machines',
    'rendezvous',
    'time_limit',
    'save_minutes',
    'resume_from',
    'restart',
    'run',
    'test_csv',
    'tta',
    'base',
    'merge',
    'submission',
    'runs',
    'predictions',
    'best_possible',
    'sweep',
    'steps',
    'seconds',
    'xyz',
    '',
    '=',
]


def case_run(rng, c):
    if rng.random() < 0.4:
        name = rng.choice(['k.ipynb', '[/b].ipynb', 'caf\udce9.ipynb', '{a}.ipynb'])
        put(rng, c.folder / name, notebook_bytes(rng))
        c.args = [rng.choice(['run', 'run', 'doctor']), name]
        if rng.random() < 0.6:
            c.args += ['-p', f"{rng.choice(['lr', 'rank', 'x'])}={rng.choice(NUMBERS + TEXTS)}"]
        if c.args[0] == 'run' and rng.random() < 0.3:
            c.args.append('--list')
        return
    kernel = rng.choice(['train', 'train', 'train', 'infer', 'blend', 'probe', 'sweep', 'wheels', *TEXTS[:12]])
    c.args = [rng.choice(['run', 'run', 'run', 'doctor']), kernel]
    (c.folder / 'config.json').write_bytes(config_bytes(rng))
    put(rng, c.folder / 't.csv', csv_bytes(rng))
    for _ in range(rng.randint(0, 3)):
        c.args += ['-p', f'{rng.choice(PARAMETERS)}={rng.choice(NUMBERS + TEXTS)}']
    if rng.random() < 0.7:
        c.args += ['-p', 'train_csv=t.csv', '-p', 'model=.']
    if rng.random() < 0.2:
        c.args += ['--out', rng.choice(TEXTS + ['t.csv', 't.csv/x', '/proc/x', '/dev/null'])]


def case_doctor(rng, c):
    put(rng, c.folder / 'probe.json', probe_bytes(rng))
    c.args = [
        'doctor',
        rng.choice(['probe.json', 'probe.json', 'probe.json', *TEXTS]),
        *option_of(rng, dict(gpus=NUMBERS)),
    ]


def case_scale(rng, c):
    for i in range(rng.randint(0, 3)):
        damaged_run(rng, c.folder / 'runs' / f'{i}')
    c.args = [rng.choice(['scale', 'scale', 'doctor']), rng.choice(['runs', 'runs/0', 'runs', *TEXTS[:9]])]
    if c.args[0] == 'scale':
        c.args += option_of(
            rng, dict(at=NUMBERS, by=['rows', 'steps', 'x'], batch=NUMBERS, out=['o', 'runs/0/config.json', '[/b]'])
        )


RUN = None  # a finished run folder to damage; set by who has one


def damaged_run(rng, folder):
    if RUN is None:
        return folder.mkdir(parents=True)
    shutil.copytree(RUN, folder)
    if rng.random() < 0.15:
        return
    for _ in range(rng.randint(1, 2)):
        files = sorted(f for f in folder.rglob('*') if f.is_file() and not f.is_symlink())
        if not files:
            return
        f = rng.choice([f for f in files if f.suffix in ('.json', '.parquet', '.jsonl')] or files)
        content = f.read_bytes()
        f.unlink()
        if f.suffix == '.json' and rng.random() < 0.8:
            content = json.dumps(
                changed(
                    rng, json.loads(content) if content[:1] == b'{' and _is_json(content) else {}, rng.randint(1, 2)
                )
            ).encode()
        else:
            content = torn(rng, content)
        put(rng, f, content)


def _is_json(content):
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def case_remote(rng, c):
    command = rng.choice(['push', 'relay', 'submit', 'probe', 'bundle', 'status', 'logs', 'pull', 'check-account'])
    kernel = rng.choice(['train', 'infer', 'k.ipynb', *TEXTS[:9]])
    put(rng, c.folder / 'k.ipynb', notebook_bytes(rng))
    params = [
        x for _ in range(rng.randint(0, 2)) for x in ('-p', f'{rng.choice(PARAMETERS)}={rng.choice(NUMBERS + TEXTS)}')
    ]
    if command in ('push', 'relay'):
        c.args = [
            command,
            kernel,
            *params,
            *option_of(
                rng,
                dict(slug=TEXTS, timeout=NUMBERS, gpus=NUMBERS, shape=TEXTS)
                if command == 'push'
                else dict(name=TEXTS, hours=NUMBERS, poll=NUMBERS),
            ),
        ]
    elif command == 'submit':
        c.args = [command, *params, *option_of(rng, dict(competition=TEXTS, kernel=TEXTS, sample=TEXTS, slug=TEXTS))]
    elif command == 'probe':
        c.args = [command, *params, *option_of(rng, dict(timeout=NUMBERS, gpus=NUMBERS, shape=TEXTS))]
    elif command == 'bundle':
        put(rng, c.folder / 'd' / 'a.bin', torn(rng, b'x' * 300))
        put(
            rng,
            c.folder / 'd' / rng.choice(['b\udce9.txt', 'b.safetensors', 'b.npy', 'b.zip', '.env', 'sub/[/x].txt']),
            torn(
                rng,
                rng.choice([b'\x93NUMPY\x01\0', b'PK\x03\x04', b'\x80\x04', b'\x1f\x8b\x08', b'BZh', bytes(8) + b'{}'])
                * 20,
            ),
        )
        c.args = [command, '--dry-run', '--folder', rng.choice(['d', 'd', 'd', 'd/a.bin', *TEXTS[:6]])]
    elif command == 'check-account':
        c.args = [command, *option_of(rng, dict(competition=TEXTS, model=TEXTS))]
    else:
        c.args = [command, rng.choice(TEXTS)]


def case_show(rng, c):
    put(rng, c.folder / 't.csv', csv_bytes(rng))
    put(rng, c.folder / 'm' / 'tokenizer.json', config_bytes(rng))
    put(rng, c.folder / 'm' / 'config.json', config_bytes(rng))
    c.args = [
        'show',
        't.csv',
        '--model',
        rng.choice(['m', 'm', *TEXTS[:8]]),
        *option_of(rng, {'row': NUMBERS, 'head': ['joint', 'x'], 'max-length': NUMBERS}),
    ]


def case_demo(rng, c):
    c.args = [
        'demo',
        *option_of(
            rng, dict(out=[*TEXTS[:14], 't.csv'], seed=NUMBERS, train=['t.csv', *TEXTS[:5]], test=['t.csv', *TEXTS[:5]])
        ),
    ]
    put(rng, c.folder / 't.csv', csv_bytes(rng))


MAKERS = dict(
    check=case_check,
    submission=case_submission,
    plan=case_plan,
    sweep=case_sweep,
    run=case_run,
    doctor=case_doctor,
    scale=case_scale,
    remote=case_remote,
    show=case_show,
    demo=case_demo,
)


# ---- what becomes of them
class Hang(BaseException):
    "A command that takes longer than it may."


class Started(Exception):
    "A kernel, a training or a talk with Kaggle would begin here: every check is over."


NO_ACCOUNT = 'no Kaggle credentials'


@contextlib.contextmanager
def stand_ins():
    "While it lasts nothing long is begun: no Jupyter, no training, no network."
    from unittest.mock import patch

    from underdog.core import UserError

    def start(*args, **kwargs):
        raise Started

    def no_account():
        raise UserError(NO_ACCOUNT)

    def pretend(trial_run, turn, end=0):
        trial_run.trial.set_user_attr('curve', [0.5])
        from underdog.search.trials import _tell

        _tell(trial_run, 'complete', [0.5 + trial_run.trial.number / 10])
        return 'complete'

    with contextlib.ExitStack() as held:
        for target, stand_in in {
            'papermill.execute_notebook': start,
            'underdog.search.trials.run_trial': pretend,
            'underdog.console.doctor.imports_offline': lambda: [],
            'underdog.kaggle.account._client': no_account,
            'underdog.console.demo.smollm2': lambda: Path('.'),
        }.items():
            held.enter_context(patch(target, stand_in))
        yield


def outcome(case, limit=10):
    "(kind, text, files left) of a case: ok, started, message, usage, traceback or hang."
    from underdog.console.main import main

    def late(*_):
        raise Hang

    before, here = {f for f in case.folder.rglob('*')}, os.getcwd()
    said = io.StringIO()
    handler = signal.signal(signal.SIGALRM, late)
    os.chdir(case.folder)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(case.args)
        kind, text = 'ok', ''
    except SystemExit as e:
        kind, text = {0: 'ok', None: 'ok', 1: 'message', 2: 'usage'}.get(e.code, f'exit {e.code}'), ''
    except Started:
        kind, text = 'started', ''
    except Hang:
        kind, text = 'hang', where()
    except BaseException:
        kind, text = 'traceback', where()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(here)
    new = sorted({f for f in case.folder.rglob('*')} - before)
    return kind, text or said.getvalue(), [str(f.relative_to(case.folder)) for f in new]


def where():
    "The error, and the last lines of ours on the way to it."
    kind, error, tb = sys.exc_info()
    ours = [
        f'{Path(f.filename).name}:{f.lineno} {f.name}' for f in traceback.extract_tb(tb) if '/underdog/' in f.filename
    ]
    return f"{kind.__name__}: {str(error)[:150]} at {' > '.join(ours[-3:])}"


def wrong(kind, text, left):
    "What is wrong with an outcome, '' if nothing."
    if kind in ('traceback', 'hang') or kind.startswith('exit'):
        return f'{kind}: {text}'
    if any(Path(f).name.endswith('.tmp') for f in left):
        return f'half-written: {left}'
    if kind == 'message':
        if 'Traceback' in text or 'underdog:' not in text and 'Error' not in text:
            return f'no message: {text[-300:]}'
        if len(text) > 6000:
            return f'long message {len(text)}: {text[:200]}'
    return ''


def attack(rng, folder, only=None):
    "A `Case` in `folder`."
    case = Case(Path(folder))
    MAKERS[only or rng.choice(sorted(MAKERS))](rng, case)
    return case


if __name__ == '__main__':
    import random
    import resource
    from collections import Counter, defaultdict

    first, last, only = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
    import faulthandler

    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
    from importlib import import_module

    # what is loaded on first use counts for nobody
    for name in (
        'underdog.console.run_doctor',
        'underdog.search.trials',
        'transformers.models.auto',
        'optuna',
        'sklearn.linear_model',
        'matplotlib.figure',
    ):
        import_module(name)
    kinds, found, slow = Counter(), defaultdict(list), []
    if os.environ.get('RUN'):
        RUN = os.environ['RUN']
    with stand_ins():
        for seed in range(first, last):
            with tempfile.TemporaryDirectory() as folder:
                rng = random.Random(seed)
                case = attack(rng, folder, only)
                began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
                kind, text, left = outcome(case)
                took = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
            if kind in ('message', 'usage') and left:
                kinds[f'{kind}, files left'] += 1
            kinds[kind] += 1
            bad = wrong(kind, text, left)
            key = bad.split(' at ')[-1] if ' at ' in bad else bad[:60]
            if bad:
                found[key].append((seed, bad, case.args))
            if took > 2:
                slow.append((round(took, 1), seed, case.args))
            if os.environ.get('SHOW'):
                print(
                    seed,
                    kind,
                    repr(case.args)[:150],
                    '|',
                    text[-int(os.environ['SHOW']) :].strip() if kind != 'ok' else '',
                    '|',
                    left[:4] if kind in ('message', 'usage') else '',
                )
    print(dict(kinds))
    for key, cases in sorted(found.items(), key=lambda kv: -len(kv[1])):
        seed, bad, args = cases[0]
        print(f'{len(cases):4} {bad[:420]}\n       seed {seed}: {repr(args)[:200]}')
    for row in sorted(slow)[-8:]:
        print('slow', repr(row)[:200])
