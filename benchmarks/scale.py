"""Does the law of small runs hold? The largest size is held out, over and over, and its loss predicted from the smaller ones.

    python -m benchmarks.scale [--seeds 10] [--data train.csv]

What learns are the floors, which take seconds instead of hours: the length and the TF-IDF floor on 1/16, 1/8, 1/4 and 1/2 of the rows of a fold predict what all of them give. Without `--data`: the Tulu-1 rows beside the repository, else generated ones. `coverage` is
the share of the intervals (90 %) that hold the truth, for real rows beside that for laws that are known exactly. The last line is JSON.
"""
import argparse
import math
import os
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')

from benchmarks.common import last_line, shared_file, table   # noqa: E402

SHARES = (1/16, 1/8, 1/4, 1/2, 1.)


def held_losses(df, comp, cfg):
    "(rows learned from, {floor: held-out losses}) with the settings `cfg`."
    import pandas as pd
    from underdog.data.metrics import row_log_loss
    from underdog.data.folds import labels_of, prompt_groups
    from underdog.data.floors import Floors
    from underdog.training.prepare import with_folds
    part = with_folds(df, cfg)
    held = (part['fold'] == cfg.fold).to_numpy()
    rows, y = part[held], labels_of(part[held], comp)
    predicted = Floors.fit(part[~held].reset_index(drop=True), comp).predict(rows)
    return float((~held).sum()), {k: pd.DataFrame(dict(loss=row_log_loss(y, predicted[k]), group=prompt_groups(rows)), index=rows['id']) for k in ('length', 'tfidf')}


def on_rows(df, comp, seed):
    "[(floor, inside, predicted, truth)] of one split; a floor that is refused is left out."
    import numpy as np
    from underdog.core import UserError
    from underdog.search.scaling import Points, predict, standard_errors
    from underdog.training.settings import TrainConfig
    sizes, losses = zip(*(held_losses(df, comp, TrainConfig(share=s, seed=seed)) for s in SHARES))
    found = []
    for floor in losses[0]:
        held = [x[floor] for x in losses]
        means = np.array([h['loss'].mean() for h in held])
        try: q = predict(Points(floor, np.array(sizes[:-1]), means[:-1], standard_errors(held[:-1])), sizes[-1], seed=seed)
        except UserError: continue
        found.append((floor, q.low <= means[-1] <= q.high, q.loss, means[-1]))
    return found


def on_known_laws(n):
    "Share of the intervals that hold the truth of `n` laws, whose points are drawn with known errors."
    import numpy as np
    from underdog.core import UserError
    from underdog.search.scaling import Points, law, predict
    rng, sizes, inside = np.random.default_rng(0), np.array([1000., 2000, 4000, 8000]), []
    for i in range(n):
        truth, se = (rng.uniform(.8, .95), rng.uniform(1., 4.), rng.uniform(.25, .6)), np.full(4, rng.uniform(.001, .004))
        try: q = predict(Points('law', sizes, law(*truth, sizes) + rng.normal(size=4)*se, se), 32_000, draws=300, seed=i)
        except UserError: continue
        inside.append(q.low <= law(*truth, 32_000) <= q.high)
    return float(np.mean(inside)), len(inside)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=10, help='splits of the rows')
    parser.add_argument('--data', default='', help='labelled csv')
    args = parser.parse_args()
    from tqdm import tqdm
    from underdog.data.competition import get_competition
    from underdog.data.rows import read_rows
    from underdog.data.sample import write_sample
    with tempfile.TemporaryDirectory() as folder:
        file = args.data or shared_file('tulu1_1150.csv') or write_sample(Path(folder), 1200, 10)['train.csv']
        df, report = read_rows(file, None, labelled=True)
    comp = get_competition(report.competition)
    found = [x for seed in tqdm(range(args.seeds), desc='splits') for x in on_rows(df, comp, seed)]
    known, n = on_known_laws(500)
    mine = {k: [x for x in found if x[0] == k] for k in ('length', 'tfidf')}
    rows = {k: (sum(x[1] for x in v)/len(v), math.sqrt(sum((x[2] - x[3])**2 for x in v)/len(v)), len(v)) for k, v in mine.items() if v}
    table(f'intervals of 90 %: {Path(file).name}', ('what learns', 'coverage', 'error (rms)', 'predictions', 'refused'), [(k, f'{c:.0%}', f'{e:.4f}', n_, args.seeds - n_) for k, (c, e, n_) in rows.items()] + [('known laws', f'{known:.0%}', '', n, 500 - n)])
    last_line(dict(coverage={k: c for k, (c, _, _) in rows.items()}, error={k: e for k, (_, e, _) in rows.items()}, known_laws=known, data=Path(file).name, seeds=args.seeds))


if __name__ == '__main__': main()
