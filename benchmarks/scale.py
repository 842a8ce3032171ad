"""Does the law of small runs hold? The loss at the largest size is predicted from smaller ones, over and over.

    python -m benchmarks.scale [--seeds 10] [--data train.csv]

What learns are the baselines, which take seconds instead of hours: length and TF-IDF on 1/16, 1/8, 1/4 and 1/2 of the
rows of a fold predict what all of them give. Without `--data`: the Tulu-1 rows beside the repository, else generated
ones. `coverage` is the share of the intervals (90 %) that hold the truth, for real rows beside that for laws that are
known exactly. The last line of output is JSON.
"""
import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')

from benchmarks.common import last_line, shared_file, table   # noqa: E402

SHARES = (1/16, 1/8, 1/4, 1/2, 1.)
LEARNERS = ('length', 'tfidf')   # baselines
KNOWN_LAWS = 500


class Outcome(NamedTuple):
    "A prediction beside the truth."
    learner: str
    inside: bool       # is the truth in the interval?
    predicted: float   # log loss
    truth: float


def held_losses(df, comp, cfg):
    "(rows learned from, {baseline: held-out losses}) with the settings `cfg`."
    import pandas as pd
    from underdog.data.floors import Floors
    from underdog.data.folds import labels_of, prompt_groups
    from underdog.data.metrics import row_log_loss
    from underdog.training.table import with_folds
    part = with_folds(df, cfg)
    held = (part['fold'] == cfg.fold).to_numpy()
    # fit on the training rows, predict the held-out ones
    rows = part[held]
    predicted = Floors.fit(part[~held].reset_index(drop=True), comp).predict(rows)
    y, group = labels_of(rows, comp), prompt_groups(rows)
    losses = {}
    for name in LEARNERS:
        losses[name] = pd.DataFrame(dict(loss=row_log_loss(y, predicted[name]), group=group), index=rows['id'])
    return float((~held).sum()), losses


def on_rows(df, comp, seed):
    "The `Outcome`s of one split; a baseline whose prediction is refused is left out."
    import numpy as np
    from underdog.core import UserError
    from underdog.search.scaling import Points, extrapolate, standard_errors
    from underdog.training.settings import TrainConfig
    sizes, losses = zip(*(held_losses(df, comp, TrainConfig(share=share, seed=seed)) for share in SHARES))
    outcomes = []
    for name in LEARNERS:
        held = [by_name[name] for by_name in losses]
        means = np.array([h['loss'].mean() for h in held])
        # the largest size is not shown to the prediction
        points = Points(name, np.array(sizes[:-1]), means[:-1], standard_errors(held[:-1]))
        try: prediction = extrapolate(points, sizes[-1], seed=seed)
        except UserError: continue
        inside = prediction.low <= means[-1] <= prediction.high
        outcomes.append(Outcome(name, inside, prediction.loss, means[-1]))
    return outcomes


def on_known_laws(n):
    "(share of the intervals that hold the truth, their number) of `n` laws whose points are drawn with known errors."
    import numpy as np
    from underdog.core import UserError
    from underdog.search.scaling import Points, extrapolate, law
    rng, sizes, inside = np.random.default_rng(0), np.array([1000., 2000, 4000, 8000]), []
    for i in range(n):
        # a law, and points beside it
        truth = rng.uniform(.8, .95), rng.uniform(1., 4.), rng.uniform(.25, .6)
        errors = np.full(4, rng.uniform(.001, .004))
        losses = law(*truth, sizes) + rng.normal(size=4)*errors
        try: prediction = extrapolate(Points('law', sizes, losses, errors), 32_000, draws=300, seed=i)
        except UserError: continue
        inside.append(prediction.low <= law(*truth, 32_000) <= prediction.high)
    return float(np.mean(inside)), len(inside)


class Summary(NamedTuple):
    "Of the outcomes of one baseline."
    coverage: float   # share of the intervals that hold the truth
    error: float      # root of the mean squared difference
    predictions: int


def summarize(outcomes):
    inside = sum(o.inside for o in outcomes)/len(outcomes)
    error = math.sqrt(sum((o.predicted - o.truth)**2 for o in outcomes)/len(outcomes))
    return Summary(inside, error, len(outcomes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=10, help='splits of the rows')
    parser.add_argument('--data', default='', help='labelled csv')
    args = parser.parse_args()
    from tqdm import tqdm
    from underdog.data.competition import get_competition
    from underdog.data.rows import read_rows
    from underdog.data.sample import write_sample
    # the rows
    with tempfile.TemporaryDirectory() as folder:
        file = args.data or shared_file('tulu1_1150.csv') or write_sample(Path(folder), 1200, 10)['train.csv']
        df, report = read_rows(file, None, labelled=True)
    comp, name = get_competition(report.competition), Path(file).name
    # predictions on them, and on laws that are known
    outcomes = []
    for seed in tqdm(range(args.seeds), desc='splits'): outcomes += on_rows(df, comp, seed)
    known, known_predictions = on_known_laws(KNOWN_LAWS)
    # figures
    by_learner = {learner: [o for o in outcomes if o.learner == learner] for learner in LEARNERS}
    summaries = {learner: summarize(own) for learner, own in by_learner.items() if own}
    rows = [(learner, f'{s.coverage:.0%}', f'{s.error:.4f}', s.predictions, args.seeds - s.predictions)
            for learner, s in summaries.items()]
    rows.append(('known laws', f'{known:.0%}', '', known_predictions, KNOWN_LAWS - known_predictions))
    columns = ('what learns', 'coverage', 'error (rms)', 'predictions', 'refused')
    table(f'intervals of 90 %: {name}', columns, rows)
    last_line(dict(
        coverage={learner: s.coverage for learner, s in summaries.items()},
        error={learner: s.error for learner, s in summaries.items()},
        known_laws=known,
        data=name,
        seeds=args.seeds,
    ))


if __name__ == '__main__': main()
