"""Does the best learning rate of small runs hold for all of the rows? Real trainings: sweeps at a quarter and a half of the rows, then the truth.

    python -m benchmarks.learning_rate [--rows 2400] [--layers 2] [--out runs/learning_rate]

The model is the lower layers of SmolLM2-135M with LoRA, without help from the floors, on generated rows. `regret` is what the predicted learning rate costs: its held-out loss on all rows, less the least of all that were tried there. It takes a quarter of an hour and goes on where it was stopped. The last line is JSON.
"""
import argparse
import os
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')

from benchmarks.common import last_line, table   # noqa: E402

RATES = [3e-4, 1e-3, 3e-3, 1e-2]


def sweep(name, fixed, shares, rates, out):
    "The valleys of runs with `rates` at `shares` of the rows: batch, {n: (lr, losses, standard errors)}."
    from underdog.search.learning_rate import valleys
    from underdog.search.scaling import find_runs
    from underdog.search.sweep import Sweep, run_sweep
    run_sweep(Sweep(dict(share=shares, lr=rates), search='grid', trials=len(shares)*len(rates), fixed=fixed), out/name)
    found, = valleys(find_runs([out/name])).values()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=2400, help='generated; a fifth is held out')
    parser.add_argument('--layers', type=int, default=2, help='of the model')
    parser.add_argument('--out', type=Path, default=Path('runs/learning_rate'), help='folder of the sweeps')
    args = parser.parse_args()
    from underdog.console.demo import smollm2
    from underdog.search.learning_rate import best_rates
    from underdog.data.sample import write_sample
    out, whole = args.out/f'{args.rows}-{args.layers}', args.rows*4//5
    file = out/'rows'/'train.csv'
    if not file.is_file(): write_sample(file.parent, args.rows, 10)
    fixed = dict(train_csv=str(file), model=str(smollm2()), layers=args.layers, quantization='none', max_length=128, rank=16, alpha=32, head_lr=1e-3, start='none', probe_rows=0, evaluations=1)
    found = best_rates({'all runs': sweep('small', fixed, [.25, .5], RATES, out)}, whole)
    told = found.iloc[-1]
    rows = [(f'{r.n:,}', *(f'{v:.2e}' for v in (r.lr, r.low, r.high)), r.refused) for r in found.itertuples()]
    table('best learning rate', ('rows', 'rate', 'from', 'to', 'refused'), rows)
    if told['refused']: return last_line(dict(refused=told['refused'], rows=args.rows))
    (lr, losses, _), = sweep('full', fixed, [1.], RATES, out)[1].values()
    rate = float(f'{told["lr"]:.2e}')
    (_, (own,), _), = sweep(f'predicted-{rate}', fixed, [1.], [rate], out)[1].values()
    table(f'held-out loss, all {whole:,} rows', ('rate', 'loss'), [*((f'{a:.2e}', f'{b:.4f}') for a, b in zip(lr, losses)), (f'{rate:.2e}, predicted', f'{own:.4f}')])
    last_line(dict(predicted=told['lr'], low=told['low'], high=told['high'], best_tried=lr[losses.argmin()], regret=own - min(own, losses.min()), rows=args.rows, layers=args.layers))


if __name__ == '__main__': main()
