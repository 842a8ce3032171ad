"""Rehearse the road to Kaggle: a shell whose `underdog` and `kaggle` talk to a Kaggle on this machine.

The client is the unmodified one, and what is pushed is run. The account is `me`, with 30 GPU hours; the competition
holds generated rows, the model has two layers of random weights. Nothing leaves this machine, and all of it is gone
when the shell is left."""
import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO/'lib'))
from kaggle_server import KaggleServer, log_loss_of   # noqa: E402

MODEL, VERSION = 'google/gemma-2/transformers/gemma-2-2b-it', 2
# what may be made to go wrong
FAULTS = {
    'phone': (dict(phone=False, total_s=0), 'the phone number is not confirmed'),
    'rules': (dict(no_rules={'llm-classification-finetuning'}), "the competition's rules are not accepted"),
    'licence': (dict(no_licence={'google/gemma-2'}), "the model's licence is not accepted"),
    'quota': (dict(used_s=29.5*3600), 'half a GPU hour is left this week'),
    'shape': (dict(replace_shape='NvidiaL4'), 'Kaggle gives one L4 instead of two T4s'),
    'stale': (dict(stale_mounts=10**6, stale_s=20.), 'for 20 seconds datasets are mounted as they were before'),
    'late': (dict(readback_lag=3, status_lag=2), 'Kaggle shows the version before for a while'),
}
WELCOME = """
A Kaggle on this machine answers `underdog` and `kaggle` in this shell; `exit` leaves it, and all of it is gone.
  account      {user}{faults}
  competition  {slug}: {train} rows, generated; train.csv and test.csv are here, too
  model        {model}/{version}: tiny, random weights
What to type: nbs/guides/rehearsal.md
"""


def furnish(server, folder, train=200, test=40):
    "Give the `server` a competition and a model, and the working `folder` the files of the competition."
    from fixtures import make_base

    from underdog.core import read_json
    from underdog.data.competition import LLM_FINETUNING as competition
    from underdog.data.sample import write_sample
    from underdog.machine import quiet
    quiet()
    files = write_sample(folder, train, test)
    truth = files.pop('truth.json')
    # the answers: one of each row's classes, as likely as the law of the generated rows says
    chance, columns = random.Random(0), competition.label_columns
    lines = ['id,' + ','.join(columns)]
    for row, probabilities in read_json(truth)['test'].items():
        drawn, = chance.choices(range(len(columns)), probabilities)
        lines.append(','.join([row, *(str(int(i == drawn)) for i in range(len(columns)))]))
    answers = server.root/'answers.csv'
    answers.write_text('\n'.join(lines))
    # a saved notebook sees three rows of the test, a scored one all of them
    hidden, public = server.root/'hidden', server.root/'public'
    for place, rows in ((hidden, test), (public, 3)):
        place.mkdir()
        for name, file in files.items(): _copy_rows(file, place/name, train if name == 'train.csv' else rows)
    truth.unlink()
    server.add_competition(competition.slug, public, hidden, log_loss_of(answers, columns))
    model = server.root/'model'
    make_base(model, hidden_size=64)
    # the versions before are the same
    server.models[MODEL] = [model]*VERSION
    return competition.slug


def _copy_rows(source, target, rows):
    "The first `rows` rows of a csv, to another."
    import pandas as pd
    pd.read_csv(source, dtype=str, keep_default_na=False)[:rows].to_csv(target, index=False)


def environment(server, folder):
    "That of the shell: the account of the rehearsal, and this machine's Python first."
    home = {'UNDERDOG_HOME': str(server.root/'home'), 'UNDERDOG_CACHE': str(server.root/'cache')}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    env = server.environment() | home | {'PATH': path, 'PS1': 'kaggle on this machine$ ', 'PWD': str(folder)}
    return env | {'PYTHONPATH': os.pathsep.join([env['PYTHONPATH'].rstrip(os.pathsep), str(REPO/'lib')])}


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='what may go wrong:\n' + '\n'.join(
                                         f'  {name:9}{what}' for name, (_, what) in FAULTS.items()))
    parser.add_argument('--wrong', action='append', default=[], choices=FAULTS, metavar='WHAT',
                        help='make something go wrong (below); may be repeated')
    parser.add_argument('command', nargs=argparse.REMAINDER, help='to run instead of a shell')
    given = parser.parse_args(args)
    with tempfile.TemporaryDirectory(prefix='rehearsal-') as root:
        folder = Path(root)/'work'
        folder.mkdir()
        server = KaggleServer(Path(root)/'kaggle').start()
        try:
            slug = furnish(server, folder)
            for name in given.wrong: vars(server).update(FAULTS[name][0])
            wrong = ''.join(f'; {FAULTS[name][1]}' for name in given.wrong)
            print(WELCOME.format(user=server.user, faults=wrong, slug=slug, train=200, model=MODEL, version=VERSION),
                  flush=True)
            command = given.command or ['bash', '--noprofile', '--norc', '-i']
            return subprocess.run(command, cwd=folder, env=environment(server, folder)).returncode
        finally: server.stop()


if __name__ == '__main__': sys.exit(main())
