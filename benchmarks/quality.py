"""Who predicts best with the same CPU seconds, on the same rows and folds?

    python -m benchmarks.quality --train FILE [FILE ...] [--folds 2] [--share .5] [--layers 3] [--max-length 112]
                                 [--epochs 1] [--rows 0] [--more JSON] [--without-peers] [--out DIR]

Every prompt-grouped fold of every file is trained by underdog: the `pair` head on SmolLM2's lower layers, from its best
baseline. What that took, from the file to the held-out predictions, is the budget of the others, which learn from the
same rows: Hugging Face's Trainer with LoRA on the same layers, and logistic regression on their frozen embeddings. The
student's stack (regressions on columns and words, boosted trees, a pool of them) is the best of our baselines. Folds
that are finished in --out are not computed again. Losses are pooled over folds; a difference is paired, its interval is
a bootstrap over prompts. The last line of output is JSON.
"""
import argparse
import json
import os
import resource
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')

import numpy as np   # noqa: E402
import pandas as pd   # noqa: E402

from benchmarks.common import last_line, one_thread, table   # noqa: E402
from benchmarks.quality_peers import Answer, Task, frozen, trainer   # noqa: E402
from underdog.core import atomic_path, read_json, write_json   # noqa: E402
from underdog.runfolder import RunFolder, baselines_in, columns   # noqa: E402
from underdog.data.competition import get_competition   # noqa: E402
from underdog.data.metrics import bootstrap_ci, log_loss, paired_ci   # noqa: E402
from underdog.data.rows import read_rows   # noqa: E402
from underdog.inference.blend import contained, cross_fit   # noqa: E402
from underdog.model.settings import ModelConfig   # noqa: E402
from underdog.training.settings import TrainConfig   # noqa: E402

OURS, BLEND, START = 'underdog, model', 'underdog, blend', 'the baseline it starts from'
STACK = "the student's stack (our baselines)"
PEERS = {'frozen embeddings, logistic regression': 'frozen', 'Trainer, LoRA': 'trainer'}


@dataclass(frozen=True)
class Settings:
    "Of all sides."
    folds: int
    share: float        # of the training rows
    layers: int         # of SmolLM2
    max_length: int     # tokens of an answer with its prompt
    epochs: float       # of underdog
    rows: int           # of each file, the first ones; 0: all
    more: dict          # what else underdog trains with, of `ModelConfig` and `TrainConfig`


def cpu_seconds():
    "Of this process and of those that it has seen end."
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(s.ru_utime + s.ru_stime for s in spent)


def some_rows(file, out, n):
    "The file, or one in `out` with its first `n` rows."
    if not n: return file
    out.mkdir(parents=True, exist_ok=True)
    part = out/file.name
    with atomic_path(part) as tmp: pd.read_csv(file, dtype=str, keep_default_na=False).head(n).to_csv(tmp, index=False)
    return part


# ---- the sides
def ours(file, out, fold, settings):
    "The run of one fold, with its CPU seconds in `seconds.json`."
    from underdog.text.prompt import PromptConfig
    from underdog.training.run import train
    from underdog.console.demo import smollm2
    run, noted = RunFolder(out/f'ours-{fold}'), out/f'ours-{fold}'/'seconds.json'
    if noted.is_file(): return run
    began = cpu_seconds()
    given = dict(path=str(smollm2()), layers=settings.layers, quantization='none', rank=16, alpha=32,
                 share=settings.share, epochs=settings.epochs, n_folds=settings.folds, fold=fold, lr=3e-4,
                 evaluations=1) | settings.more
    of = lambda config: {f.name: given[f.name] for f in fields(config) if f.name in given}
    train(file, ModelConfig(**of(ModelConfig)), run.path, PromptConfig(max_length=settings.max_length),
          cfg=TrainConfig(**of(TrainConfig)))
    write_json(noted, dict(seconds=cpu_seconds() - began))
    return RunFolder.open(run.path)


def task_of(run, texts, settings):
    "What a peer is given: the rows of the run."
    from underdog.console.demo import smollm2
    comp, rows = get_competition(run.config['competition']), run.rows()
    joined = lambda ids: [tuple('\n\n'.join(filter(None, turns)) for turns in row) for row in texts.loc[ids].to_numpy()]
    train = rows[~rows['held']]
    return Task(str(smollm2()), settings.layers, settings.max_length, joined(train['id']),
                train[columns('y', comp)].to_numpy(), joined(run.oof('id')['id']),
                read_json(run.path/'seconds.json')['seconds'])


def peer(name, out, fold, task):
    "The `Answer` of the peer `name` to the rows of a fold, kept in a file."
    file = out/f'{name}-{fold}.npz'
    if not file.is_file():
        one_thread()
        answer = trainer(task, str(out/'trainer')) if name == 'trainer' else frozen(task)
        with atomic_path(file) as tmp, open(tmp, 'wb') as f: np.savez(f, **asdict(answer))
    with np.load(file) as saved: return Answer(saved['p'], float(saved['seconds']), float(saved['learned']))


# ---- compared
def pooled(out, texts, settings, peers=PEERS):
    "(y, {side: probabilities}, groups, {side: CPU seconds a fold}, rows learned from) of a file, all folds together."
    runs = [RunFolder.open(out/f'ours-{k}') for k in range(settings.folds)]
    comp = get_competition(runs[0].config['competition'])
    tables = [run.oof().assign(best=run.config['best_floor']) for run in runs]
    oof = pd.concat(tables, ignore_index=True)
    of = lambda prefix: oof[columns(prefix, comp)].to_numpy()
    groups = pd.factorize(pd.MultiIndex.from_frame(oof[['fold', 'group']]))[0]
    # ours: what each fold started from, chosen on its training rows; the blend by weights of other prompts
    y, baselines = of('y'), {name: of(f'floor_{name}') for name in baselines_in(oof)}
    start = np.stack([baselines[name][i] for i, name in enumerate(oof['best'])])
    sides = {'class prior': baselines['prior'], STACK: baselines['stack'], START: start, OURS: of('p'),
             BLEND: cross_fit(y, dict(model=of('p'), baseline=start), groups, contained(runs, 'baseline'))}
    seconds = {OURS: np.mean([read_json(run.path/'seconds.json')['seconds'] for run in runs])}
    # theirs
    for title, name in peers.items():
        answers = [peer(name, out, k, task_of(run, texts, settings)) for k, run in enumerate(runs)]
        sides[title] = np.vstack([answer.p for answer in answers])
        seconds[title] = np.mean([answer.seconds for answer in answers])
    return y, sides, groups, seconds, np.mean([run.config['data']['train_rows'] for run in runs])


def figures_of(y, sides, groups):
    "{side: loss, its interval, and how much better our blend is, with the interval of that}."
    figures = {}
    for name, p in sides.items():
        worse, low, high = paired_ci(y, p, sides[BLEND], groups)
        interval = [round(end, 4) for end in bootstrap_ci(y, p, groups)]
        figures[name] = dict(loss=log_loss(y, p), interval=interval, behind_blend=worse,
                             behind_interval=[round(end, 4) for end in (low, high)])
    return figures


_EQUAL = 1e-6   # nats

def verdict(figures):
    "Where underdog stands: first, tied with whoever is first, or behind."
    mine = {name: figures[name]['loss'] for name in (OURS, BLEND)}
    others = {name: f['loss'] for name, f in figures.items() if name not in (*mine, START)}
    first = min(others, key=others.get)
    ahead = others[first] - min(mine.values())
    if ahead > _EQUAL: return 'first'
    # a model that has earned nothing is its baseline
    low, high = figures[first]['behind_interval']
    return f'tied with {first}' if ahead >= -_EQUAL or low < 0 < high else f'behind {first}'


def promises(y, sides, groups):
    "What a model may not cost: {which: (difference in log loss, its interval)}, below 0 is a gain."
    part = min((OURS, START), key=lambda name: log_loss(y, sides[name]))
    pairs = {'model less its start': (OURS, START), 'blend less its best part': (BLEND, part),
             'blend less the stack': (BLEND, STACK)}
    return {name: [round(v, 4) for v in paired_ci(y, *(sides[side] for side in pair), groups)]
            for name, pair in pairs.items()}


def show(name, figures, seconds):
    span = lambda ends: f'{ends[0]:+.4f} to {ends[1]:+.4f}'
    rows = []
    for side, f in sorted(figures.items(), key=lambda item: item[1]['loss']):
        low, high = f['interval']
        spent = f'{seconds[side]:.0f}' if side in seconds else ''
        rows.append((side, f"{f['loss']:.4f}", f'{low:.4f} to {high:.4f}', f"{f['behind_blend']:+.4f}",
                     span(f['behind_interval']), spent))
    table(name, ('side', 'log loss', '95 %', 'behind the blend', '95 %', 'CPU s a fold'), rows)


# what `--more` may hold: the rest is the same for all sides, and has its own option
MORE = {f.name for config in (ModelConfig, TrainConfig) for f in fields(config)}
MORE -= {'path', 'layers', 'share', 'epochs', 'n_folds', 'fold'}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', nargs='+', type=Path, required=True)
    parser.add_argument('--out', type=Path, default=Path('runs/quality'))
    parser.add_argument('--folds', type=int, default=2)
    parser.add_argument('--share', type=float, default=.5, help='of the training rows that all sides learn from')
    parser.add_argument('--layers', type=int, default=3)
    parser.add_argument('--max-length', type=int, default=112, help='tokens of an answer with its prompt')
    parser.add_argument('--epochs', type=float, default=1., help='of underdog; its CPU seconds are the budget')
    parser.add_argument('--rows', type=int, default=0, help='of each file, the first ones; 0: all')
    parser.add_argument('--more', type=json.loads, default={},
                        help='what else underdog trains with, as JSON: {"lr": 1e-3, "lora_layers": "8:"}')
    parser.add_argument('--without-peers', action='store_true', help='only what underdog does')
    args = parser.parse_args()
    if not isinstance(args.more, dict) or set(args.more) - MORE:
        parser.error(f'--more: a dict of these is wanted: {", ".join(sorted(MORE))}')
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    files, results = [some_rows(file, args.out, args.rows) for file in args.train], {}
    # ours first: they set the budget
    for file in files:
        for k in range(args.folds): ours(file, args.out/file.stem, k, settings)
    for file in files:
        df, _ = read_rows(file)
        texts = df.drop_duplicates('id').set_index('id')[['prompt', 'response_a', 'response_b']]
        y, sides, groups, seconds, learned = pooled(args.out/file.stem, texts, settings,
                                                      {} if args.without_peers else PEERS)
        figures = figures_of(y, sides, groups)
        show(f'{file.name}: {len(y):,} rows, {learned:.0f} to learn from in each fold', figures, seconds)
        place, kept = verdict(figures), promises(y, sides, groups)
        print(f'underdog is {place}')
        for name, (gain, low, high) in kept.items(): print(f'{name}: {gain:+.4f} [{low:+.4f}, {high:+.4f}]', flush=True)
        results[file.stem] = dict(rows=len(y), learned=float(learned), underdog=place, **kept, seconds=seconds,
                                  sides=figures)
    last_line(dict(settings=asdict(settings), files=json.loads(json.dumps(results, default=float))))


if __name__ == '__main__': main()
