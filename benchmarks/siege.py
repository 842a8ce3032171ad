"""Attacks of every kind, generated from a seed, on the library as it stands: does it answer well?

    python -m benchmarks.siege [--cases 200] [--seed 0] [--only scored] [--minutes 30]

scored: scored runs with damaged test file, sample, run, base, settings or disk; kills: of training, inference, sweep,
demo and relay at random moments; inputs: csv bytes, settings, YAML and run folders for the commands; folders: with keys
and pickles, and harmless ones, on their way to Kaggle; disks: that become full while something is written. Jobs are
forked from one process that has imported everything. The last line of output is JSON: counts of each kind.
"""
import argparse
import importlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

from benchmarks.common import last_line
from benchmarks.siege_fork import load_everything, sweep
from benchmarks.siege_world import COUNTS, Kind, World

KINDS = ('scored', 'kills', 'inputs', 'folders', 'disks')


def besiege(folder, kinds, cases, seed):
    "{kind: counts} of so many `cases` of each of the `kinds`."
    load_everything()
    os.environ['UNDERDOG_CACHE'], os.environ['UNDERDOG_HOME'] = str(folder/'cache'), str(folder/'home')
    world, figures = World.make(folder), {}
    for name in kinds:
        kind = Kind(name)
        # a siege that is stopped, or whose time is up, says what it has found
        try: importlib.import_module(f'benchmarks.siege_{name}').attack(world, kind, cases, seed)
        except KeyboardInterrupt:
            sweep()
            print(f'{name}: stopped', flush=True)
        figures[name] = kind.figures()
        print(f"{name}: {kind.counts['answered_well']} of {kind.counts['tried']} answered well", flush=True)
    return figures


def stop_after(minutes):
    "End the kind of attack in hand, as Ctrl-C does, when so many `minutes` have passed or SIGTERM comes; 0: no limit."
    for number in (signal.SIGTERM, signal.SIGALRM): signal.signal(number, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60*minutes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, default=200, help='of each kind')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=KINDS, action='append', help='may be repeated')
    parser.add_argument('--minutes', type=float, default=0, help='after which it stops and says what it has found')
    parser.add_argument('--keep', help='a folder that is left for inspection, and used again')
    args = parser.parse_args()
    # a `TemporaryDirectory` would be removed at the end of every fork
    folder = Path(args.keep or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    stop_after(args.minutes)
    try: figures = besiege(folder, args.only or KINDS, args.cases, args.seed)
    finally:
        if not args.keep: shutil.rmtree(folder, ignore_errors=True)
    last_line(dict(**{name: sum(kind[name] for kind in figures.values()) for name in COUNTS}, kinds=figures))


if __name__ == '__main__': main()
