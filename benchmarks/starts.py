"""What may a head start from? A tie for each row against one for all; another file's reward row against a cold probe.

    python -m benchmarks.starts --train FILE [FILE ...] [--generated 500] [--layers 4] [--length 96] [--rows 700]
                                [--seeds 5] [--folds 2] [--start none floors] [--reward FILE]
                                [--what probes training lora drawn words] [--learn 160] [--cache DIR]

Frozen lower layers of SmolLM2-135M read every row once; their pooled states are kept in --cache, as an .npz a file. All
else is probes on them, as a training fits them: for every seed the files are divided into five prompt-grouped folds, of
which --folds are held out in turn. `floors` starts from the best baseline, out of fold for the rows that are learned
from. Differences are of log loss on the same held-out rows, below 0 is better; a seed's interval is a bootstrap over
prompts. With --what training, LoRA is trained from such a probe (the head alone with --rank 0), twice: with the weights
of ties trained as all else is, and left where the probe has put them; with --what lora, as a training begins, with one
tie for all rows, and from the row that a probe on all rows of --reward has found, as from a reward model's, with a
scale and a tie of at most 400 rows; with --what drawn, the head alone on 40,000 rows whose states are drawn as those of
a file, and whose means say a little of which rows tie. With --what words, a joint head says what the language model's
own words are worth on the rows. The last line of output is JSON.
"""
import argparse
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')

import numpy as np   # noqa: E402
import pandas as pd   # noqa: E402

from benchmarks.common import last_line, one_thread, table   # noqa: E402
from underdog.core import atomic_path   # noqa: E402
from underdog.data.competition import get_competition   # noqa: E402
from underdog.data.floors import BASELINES, best_floor, fit_floors   # noqa: E402
from underdog.data.folds import labels_of, make_folds, prompt_groups   # noqa: E402
from underdog.data.metrics import log_loss, paired_ci, softmax   # noqa: E402
from underdog.data.rows import read_rows   # noqa: E402

N_FOLDS, FEW = 5, 400   # rows that a reward row's scale and tie are fitted on


@dataclass(frozen=True)
class File:
    "A file of comparisons with what frozen layers say of them."
    df: pd.DataFrame
    comp: object
    x: np.ndarray       # (n, h) differences of the answers' states
    means: np.ndarray   # (n, h) their means
    y: np.ndarray
    groups: np.ndarray

    @classmethod
    def read(cls, path, args):
        "At most --rows rows of the csv `path`, and their states, from the cache or computed."
        df, comp = rows_of(path, args)
        kept = args.cache/f'{path.parent.name}-{path.stem}-{len(df)}-{args.layers}-{args.length}.npz'
        if not kept.is_file():
            with atomic_path(kept) as tmp, open(tmp, 'wb') as out: np.savez(out, states=states_of(df, args))
        states = np.load(kept)['states']
        x, means = states[:, 0] - states[:, 1], states.mean(1)
        return cls(df, comp, x, means, labels_of(df, comp).astype(float), prompt_groups(df))

    def offset(self, folds, held):
        "(n, C) log-probabilities of the best baseline, out of fold; the rows of the fold `held` are in no fit."
        inner, learned = np.full(len(self.df), -1), folds != held
        inner[learned] = make_folds(self.df[learned], N_FOLDS, 1, groups=pd.factorize(self.groups[learned])[0])
        _, predictions = fit_floors(self.df, self.comp, inner, BASELINES, groups=self.groups)
        best = best_floor(self.y[learned], {name: p[learned] for name, p in predictions.items()})
        return np.log(predictions[best])


def rows_of(path, args):
    "(at most --rows rows of the csv `path`, their competition)."
    df, report = read_rows(path, None, labelled=True)
    df = df.sample(min(len(df), args.rows), random_state=0).reset_index(drop=True)
    return df, get_competition(report.competition)


def model_on(df, args, head='pair', **settings):
    "(the lower layers of SmolLM2 with that head, the rows `df` as these read them)."
    from underdog.console.demo import smollm2
    from underdog.model.model import load_model
    from underdog.model.settings import ModelConfig
    from underdog.text.prompt import PromptConfig, Prompter
    from underdog.text.source import RowSource
    from underdog.text.tokens import tokenize_rows
    base = str(smollm2())
    model = load_model(ModelConfig(base, head=head, layers=args.layers, quantization='none', **settings))
    prompter = Prompter(PromptConfig(max_length=args.length), base, head)
    return model, RowSource(tokenize_rows(df, prompter, args.cache, ''), prompter, model.packing)


def states_of(df, args):
    "(n, 2, h) pooled states of both answers of the rows `df`, by frozen layers."
    from underdog.training.probe import pair_features
    model, source = model_on(df, args, rank=0)
    return pair_features(model, source, np.arange(len(df)), budget=2048).numpy()


def fit(file, rows, means=None, offset=None, x=None, **options):
    "(a probe fitted on these `rows` of the `file`, what predicts all rows with it)."
    import torch
    from underdog.training.probe import fit_probe
    x, part = file.x if x is None else x, lambda v: None if v is None else v[rows]
    probe = fit_probe(x[rows], file.y[rows], part(means), part(offset), groups=file.groups[rows],
                      tie=torch.zeros((), dtype=torch.float64), **options)
    s = x @ probe.weights.double().numpy()
    tie = float(probe.tie) + (0*s if means is None else means @ probe.tie_weights.double().numpy())
    z = np.stack([s/2, -s/2, tie], 1)
    return probe, softmax(z if offset is None else z + offset)


def compare_ties(file, start, seed, args):
    "A row of figures: one tie for all, a tie for each row, on the held-out folds of a `seed`."
    folds, one, own = make_folds(file.df, N_FOLDS, seed, groups=file.groups), file.y*0, file.y*0
    ridges = []
    for fold in range(args.folds):
        learned, held = np.flatnonzero(folds != fold), folds == fold
        offset = file.offset(folds, fold) if start == 'floors' else None
        one[held] = fit(file, learned, offset=offset)[1][held]
        probe, p = fit(file, learned, file.means, offset)
        own[held] = p[held]
        ridges.append(f'{probe.ridges[1]:g}')
    held = folds < args.folds
    y, groups = file.y[held], file.groups[held]
    return dict(seed=seed, rows=int(held.sum()), one=log_loss(y, one[held]), own=log_loss(y, own[held]),
                difference=paired_ci(y, own[held], one[held], groups), ridges=', '.join(ridges))


def compare_rewards(file, row, seed):
    "A row of figures: a cold probe on few rows, and the reward `row` (h,) of another file with a scale and a tie."
    folds = make_folds(file.df, N_FOLDS, seed, groups=file.groups)
    learned, held = np.flatnonzero(folds != 0)[:FEW], folds == 0
    _, cold = fit(file, learned)
    _, warm = fit(file, learned, x=file.x @ row[:, None], strengths=(1e-4,))
    y = file.y[held]
    return dict(seed=seed, cold=log_loss(y, cold[held]), reward=log_loss(y, warm[held]))


def train_ties(file, start, seed, args):
    "A row of figures: trained from a probe, with the weights of ties trained too, and with them as they were."
    folds = make_folds(file.df, N_FOLDS, seed, groups=file.groups)
    learned, held = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)
    offset = file.offset(folds, 0) if start == 'floors' else None
    parts = learned, held, offset
    (frozen, line), (trained, _) = (train_once(file, parts, seed, args, how) for how in ('still', 'own'))
    y, groups = file.y[held], file.groups[held]
    return dict(seed=seed, rows=len(held), one=log_loss(y, frozen), own=log_loss(y, trained),
                difference=paired_ci(y, trained, frozen, groups), ridges=line.split('of ties ')[1])


def train_starts(file, start, reward, seed, args):
    "A row of figures: LoRA trained with a tie for each row (as is usual), with one for all, and from the row `reward`."
    folds = make_folds(file.df, N_FOLDS, seed, groups=file.groups)
    learned, held = np.flatnonzero(folds != 0)[:args.learn], np.flatnonzero(folds == 0)
    offset = file.offset(folds, 0) if start == 'floors' else None
    usual, line = train_once(file, (learned, held, offset), seed, args, 'own')
    others = {how: train_once(file, (learned, held, offset), seed, args, how, reward)[0]
              for how in ('one', 'reward') if how == 'one' or reward is not None}
    y, groups = file.y[held], file.groups[held]
    losses = {how: log_loss(y, p) for how, p in dict(others, own=usual).items()}
    # a tie for each row less one for all; a reward row less a start of its own
    pairs = dict(ties=(usual, others['one'])) | {how: (p, usual) for how, p in others.items() if how == 'reward'}
    prior = log_loss(y, np.tile(file.y[learned].mean(0), (len(held), 1)))
    return dict(seed=seed, rows=len(held), prior=prior, **losses, ridges=line.split('of ties ')[1],
                differences={what: paired_ci(y, *pair, groups) for what, pair in pairs.items()})


def train_once(file, parts, seed, args, how, reward=None):
    """(probabilities of held-out rows after training, the line of the probe that it starts from).

    `how`: 'own' as is usual, with a tie for each row, 'still' with its weights where the probe put them, 'one' with one
    tie for all, 'reward' from the row `reward` (h,) of other preferences."""
    import torch
    from accelerate import Accelerator
    from underdog.model.predict import predict_both
    from underdog.training.probe import start_from_probe
    from underdog.training.settings import TrainConfig
    from underdog.training.step import FitData, Training
    learned, held, offset = parts
    model, source = model_on(file.df, args, seed=seed, rank=args.rank)
    cfg = TrainConfig(batch_rows=args.batch_rows, epochs=args.epochs, batch_tokens=2048, seed=seed)
    data = FitData(source, file.y, offset, train=learned, held=held)
    training = Training(model, data, cfg, Accelerator(cpu=True))
    if offset is None: model.head.start_at(torch.tensor(training.log_prior))
    # frozen layers have read every row already
    a, b = (torch.tensor(file.means + sign*file.x/2) for sign in (1, -1))
    model.features = lambda batch: torch.cat([a[batch.rows], b[batch.rows]])
    if how == 'reward':
        model.head.score.weight.data.copy_(torch.tensor(reward)[None])
        model.head_source = 'checkpoint'
    line = start_from_probe(model, data, file.groups, cfg.probe_rows, seed=seed)
    if how == 'one':
        probe, _ = fit(file, learned, offset=offset)
        start = {'score.weight': probe.weights[None], 'tie': probe.tie, 'tie_score.weight': 0*probe.weights[None]}
        model.head.load_state_dict(start)
    if args.rank: del model.features
    for group in training.optimizer.param_groups:
        if group['what'] == 'ties' and how in ('still', 'one'): group['peak'] = 0.
    for _ in training.plan: training.step()
    known = None if offset is None else offset[held]
    return predict_both(model, source, held, known, budget=2048)['both'], line


DRAWN, HELD, PROBED, STRENGTH = 40_000, 4000, 2000, .3   # rows of drawn states; of the logits of a tie


def drawn_ties(file, seed, args):
    "A row of figures as of `train_ties`: many rows, whose states are drawn as those of the `file` and say who ties."
    import torch
    rng, h = np.random.default_rng(seed), file.x.shape[1]
    draw = lambda v: v.mean(0) + rng.normal(size=(DRAWN + HELD, len(v))) @ (v - v.mean(0))/len(v)**.5
    told = lambda v, size: size*(v - v.mean(0))/v.std(0) @ rng.normal(size=h)/h**.5
    x, means = draw(file.x), draw(file.means)
    s, tie = told(x, 1.), told(means, STRENGTH)
    p = softmax(np.stack([s/2, -s/2, tie], 1))
    y = np.eye(3)[(rng.random((len(p), 1)) > p.cumsum(1)).sum(1).clip(max=2)]
    many = File(None, None, x, means, y, np.arange(len(y)))
    probe, _ = fit(many, np.arange(PROBED), means)
    a, b = (torch.tensor(means + sign*x/2, dtype=torch.float32) for sign in (1, -1))
    frozen, trained = (train_head(probe, a, b, torch.tensor(y, dtype=torch.float32), moved, args)
                       for moved in (False, True))
    held = slice(DRAWN, None)
    return dict(seed=seed, rows=HELD, one=log_loss(y[held], frozen), own=log_loss(y[held], trained),
                difference=paired_ci(y[held], trained, frozen, many.groups[held]), ridges=f'{probe.ridges[1]:g}')


def train_head(probe, a, b, y, moved, args):
    "Probabilities of the last rows after an epoch of the head over the others; `moved`: with the weights of ties?"
    import torch
    from types import SimpleNamespace
    from underdog.model.head import make_head
    from underdog.model.settings import ModelConfig
    from underdog.training.objective import make_optimizer, row_losses
    from underdog.training.schedule import lr_factor
    from underdog.training.settings import TrainConfig
    cfg, backbone = ModelConfig('', rank=0), torch.nn.Identity()
    backbone.config = SimpleNamespace(num_hidden_layers=0)
    head = make_head(cfg, a.shape[1])
    tensors = {'score.weight': probe.weights[None], 'tie_score.weight': probe.tie_weights[None], 'tie': probe.tie}
    head.load_state_dict(tensors)
    optimizer = make_optimizer(SimpleNamespace(cfg=cfg, backbone=backbone, head=head), TrainConfig(lr=1e-4))
    steps = np.random.default_rng(0).permutation(DRAWN).reshape(-1, args.batch_rows)
    for number, rows in enumerate(steps):
        for g in optimizer.param_groups:
            still = g['what'] == 'ties' and not moved
            g['lr'] = 0. if still else g['peak']*lr_factor(number, len(steps), .1)
        row_losses(head(torch.cat([a[rows], b[rows]])), y[rows]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(): return head(torch.cat([a[DRAWN:], b[DRAWN:]])).softmax(-1).numpy()


def say_words(path, args):
    "What a joint head says that starts from the language model's own words, without training."
    from underdog.training.probe import start_from_probe
    from underdog.training.step import FitData
    df, comp = rows_of(path, args)
    model, source = model_on(df, args, head='joint', rank=0)
    data = FitData(source, labels_of(df, comp).astype(float), None, np.arange(len(df)))
    return start_from_probe(model, data, prompt_groups(df), args.rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', nargs='*', type=Path, default=[])
    parser.add_argument('--generated', type=int, default=0, help='rows of the generated competition, too')
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--length', type=int, default=96, help='tokens of prompt and one answer')
    parser.add_argument('--rows', type=int, default=700, help='of a file, at most')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--folds', type=int, default=2, help='held out in turn, of five')
    parser.add_argument('--start', nargs='*', default=['none', 'floors'], choices=['none', 'floors'])
    parser.add_argument('--what', nargs='*', default=['probes'],
                        choices=['probes', 'training', 'lora', 'drawn', 'words'])
    parser.add_argument('--reward', type=Path, help='rows of other preferences, of which a reward row is learned')
    parser.add_argument('--learn', type=int, default=10**6, help='rows of --what lora to learn from, at most')
    parser.add_argument('--epochs', type=float, default=1., help='of a training')
    parser.add_argument('--rank', type=int, default=16, help='of LoRA in a training; 0: the head alone')
    parser.add_argument('--batch_rows', type=int, default=16, help='of a training')
    parser.add_argument('--cache', type=Path, default=Path('runs/starts'))
    args = parser.parse_args()
    one_thread()
    paths = list(args.train)
    if args.generated:
        from underdog.data.sample import write_sample
        paths.append(write_sample(args.cache/'generated', args.generated, 20, seed=7)['train.csv'])
    named = {f'{path.parent.name}/{path.stem}' if path.stem == 'train' else path.stem: path for path in paths}
    figures = dict(ties={}, rewards={}, training={}, lora={}, drawn={}, words={})
    if 'words' in args.what:
        figures['words'] = {name: say_words(path, args) for name, path in named.items()}
        for name, line in figures['words'].items(): print(f'{name}: {line}', flush=True)
    files = {name: File.read(path, args) for name, path in named.items()} if args.what != ['words'] else {}
    compared = files if 'probes' in args.what else {}
    rewards = {name: fit(file, np.arange(len(file.y)))[0].weights.double().numpy() for name, file in compared.items()}
    reward = reward_row(args) if args.reward and 'lora' in args.what else None
    for name, file in files.items():
        for start in args.start:
            what = f'{name}, {start}'
            if 'probes' in args.what:
                figures['ties'][what] = seeds(f'{what}: a tie by row', partial(compare_ties, file, start), args)
            if 'training' in args.what:
                figures['training'][what] = seeds(f'{what}: trained', partial(train_ties, file, start), args)
            if 'lora' in args.what:
                figures['lora'] |= lora_seeds(what, partial(train_starts, file, start, reward), args)
        if 'drawn' in args.what:
            figures['drawn'][name] = seeds(f'{name}: drawn as its states', partial(drawn_ties, file), args)
        for other in compared:
            if other == name: continue
            rows = [compare_rewards(file, rewards[other], seed) for seed in range(args.seeds)]
            figures['rewards'][f'{other} -> {name}'] = summary(rows, 'reward', 'cold')
    for part, by in figures.items():
        if not by or part == 'words': continue
        table(part, ('what', 'mean difference', 'standard error over seeds'),
              [(what, f"{f['mean']:+.4f}", f"{f['error']:.4f}") for what, f in by.items()])
    last_line(figures)


def seeds(title, compare, args):
    "The `summary` of what `compare` gives for every seed, after a table of it."
    rows = []
    for seed in range(args.seeds):
        rows.append(compare(seed, args))
        print(f"{title}, seed {seed}: {rows[-1]['own'] - rows[-1]['one']:+.4f}", flush=True)
    show = [(r['seed'], r['rows'], f"{r['one']:.4f}", f"{r['own']:.4f}",
             '{:+.4f} [{:+.4f}, {:+.4f}]'.format(*r['difference']), r['ridges']) for r in rows]
    table(title, ('seed', 'rows', 'without', 'with', 'difference', 'ridges of ties'), show)
    return summary(rows, 'own', 'one')


def lora_seeds(title, train, args):
    "Summaries of what `train` gives for every seed, a table of it before them."
    rows = []
    for seed in range(args.seeds):
        rows.append(train(seed, args))
        print(f'{title}, seed {seed}:', {k: round(rows[-1][k], 4) for k in ('own', 'one', 'reward') if k in rows[-1]},
              flush=True)
    differences = list(rows[0]['differences'])
    between = lambda r: ['{:+.4f} [{:+.4f}, {:+.4f}]'.format(*r['differences'][what]) for what in differences]
    show = [(r['seed'], r['rows'], f"{r['prior']:.4f}", f"{r['own']:.4f}", *between(r), r['ridges']) for r in rows]
    table(f'{title}: LoRA', ('seed', 'rows', 'class prior', 'as is usual', *differences, 'ridges of ties'), show)
    pairs = dict(ties=('own', 'one'), reward=('reward', 'own'))
    return {f'{title}, {what}': summary(rows, *pairs[what]) for what in differences}


def reward_row(args):
    "(h,) the row that a probe on all rows of --reward finds."
    every = argparse.Namespace(**vars(args) | dict(rows=10**6))
    file = File.read(args.reward, every)
    probe, _ = fit(file, np.arange(len(file.y)))
    row = probe.weights.double().numpy()
    print(f'the reward row of {args.reward.stem}: ridge {probe.ridges[0]:g}, out of fold {probe.loss:.4f}', flush=True)
    return row


def summary(rows, one, other):
    "Mean of the paired differences of the seeds with its standard error, and the seeds."
    d = np.array([row[one] - row[other] for row in rows])
    error = d.std(ddof=1)/len(d)**.5 if len(d) > 1 else np.nan
    return dict(mean=float(d.mean()), error=float(error), seeds={row['seed']: row for row in rows})


if __name__ == '__main__': main()
