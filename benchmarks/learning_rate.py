"""Does the best learning rate of small runs hold for all of the rows? Real trainings: small sweeps, then the truth.

    python -m benchmarks.learning_rate [--rows 2400] [--layers 2] [--out runs/learning_rate]

The model is the lower layers of SmolLM2-135M with LoRA, without help from the baselines, on generated rows. It is swept
at a quarter and a half of the rows, then at all of them. `regret` is what the predicted learning rate costs: its
held-out loss on all rows, less the least of all that were tried there. It takes a quarter of an hour and goes on where
it was stopped. The last line of output is JSON.
"""
import argparse
import os
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')

from benchmarks.common import last_line, table   # noqa: E402

RATES = [3e-4, 1e-3, 3e-3, 1e-2]


def sweep(out, fixed, shares, rates):
    "The valley of runs with `rates` at `shares` of the rows, in the folder `out`: batch, {n: (lr, losses, errors)}."
    from underdog.search.learning_rate import valleys
    from underdog.search.scaling import find_runs
    from underdog.search.sweep import Sweep
    from underdog.search.trials import run_sweep
    grid = dict(share=shares, lr=rates)
    run_sweep(Sweep(grid, search='grid', trials=len(shares)*len(rates), fixed=fixed), out)
    valley, = valleys(find_runs([out])).values()
    return valley


def on_all_rows(out, fixed, rates):
    "(rates, held-out losses) of runs on all rows."
    _, by_size = sweep(out, fixed, [1.], rates)
    (tried, losses, _), = by_size.values()
    return tried, losses


def show_best(best):
    "Print the best learning rate of each size, the predicted one last."
    rows = []
    for r in best.itertuples(): rows.append((f'{r.n:,}', f'{r.lr:.2e}', f'{r.low:.2e}', f'{r.high:.2e}', r.refused))
    table('best learning rate', ('rows', 'rate', 'from', 'to', 'refused'), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=2400, help='generated; a fifth is held out')
    parser.add_argument('--layers', type=int, default=2, help='of the model')
    parser.add_argument('--out', type=Path, default=Path('runs/learning_rate'), help='folder of the sweeps')
    args = parser.parse_args()
    from underdog.data.sample import write_sample
    from underdog.search.learning_rate import best_rates
    from underdog.console.demo import smollm2
    # rows and settings
    out, learned_from = args.out/f'{args.rows}-{args.layers}', args.rows*4//5
    file = out/'rows'/'train.csv'
    if not file.is_file(): write_sample(file.parent, args.rows, 10)
    fixed = dict(train_csv=str(file), model=str(smollm2()), layers=args.layers, quantization='none', max_length=128,
                 rank=16, alpha=32, head_lr=1e-3, start='none', probe_rows=0, evaluations=1)
    # predicted from small runs
    best = best_rates({'all runs': sweep(out/'small', fixed, [.25, .5], RATES)}, learned_from)
    predicted = best.iloc[-1]
    show_best(best)
    if predicted['refused']: return last_line(dict(refused=predicted['refused'], rows=args.rows))
    # the truth
    tried, losses = on_all_rows(out/'full', fixed, RATES)
    rate = float(f'{predicted["lr"]:.2e}')
    _, (loss,) = on_all_rows(out/f'predicted-{rate}', fixed, [rate])
    rows = [(f'{a:.2e}', f'{b:.4f}') for a, b in zip(tried, losses)]
    rows.append((f'{rate:.2e}, predicted', f'{loss:.4f}'))
    table(f'held-out loss, all {learned_from:,} rows', ('rate', 'loss'), rows)
    last_line(dict(
        predicted=predicted['lr'],
        low=predicted['low'],
        high=predicted['high'],
        best_tried=tried[losses.argmin()],
        regret=loss - min(loss, losses.min()),
        rows=args.rows,
        layers=args.layers,
    ))


if __name__ == '__main__': main()
