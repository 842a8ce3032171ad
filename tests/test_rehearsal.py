"The rehearsal of the road to Kaggle: what its guide shows is typed into its shell, and what may go wrong is heard of."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kaggle_server import KaggleServer
from rehearse import FAULTS, main

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT/'nbs'/'guides'/'rehearsal.md').read_text()
SHOWN = re.findall(r'```sh\n(.*?)```', GUIDE, re.S)


def test_make_opens_the_shell():
    def dry(*args):
        command = ['make', '-n', '--no-print-directory', 'rehearse', *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert SHOWN[0] == 'make rehearse\n'
    assert dry().splitlines()[-1].strip() == '.venv/bin/python tests/rehearse.py'
    assert 'tests/rehearse.py --wrong rules --wrong licence' in dry('WRONG=rules licence')


def test_every_command_of_the_guide_is_typed():
    script = ''.join(SHOWN[1:]) + '''
ls runs/gemma-1-1/run/report.html
test ! -e truth.json
kaggle competitions submissions -c llm-classification-finetuning
python -c 'import urllib.request as u; u.urlopen("https://www.kaggle.com")' || echo 'nothing leaves'
'''
    done = subprocess.run([sys.executable, ROOT/'tests'/'rehearse.py', 'bash', '-ec', script], text=True,
                          env=dict(os.environ, COLUMNS='100'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout
    assert done.returncode == 0, output
    assert 'model google/gemma-2/transformers/gemma-2-2b-it/2' in output and 'session 1: finished' in output
    assert '• gemma-2-2b-it in nf4, pair head' in output, 'by its name, not by the version that ends its path'
    assert 'submission.csv is valid, 3 rows' in output and 'CV and leaderboard' in output
    assert 'Kernel version 1 successfully pushed' in output and 'runs/gemma-1-1/run/report.html' in output
    assert 'a test wants to reach www.kaggle.com' in output and output.rstrip().endswith('nothing leaves')


@pytest.mark.parametrize('wrong,command,said', [
    ('phone', 'check-account', 'confirm your phone number'),
    ('rules', 'check-account', 'accept'),
    ('licence', 'check-account --model google/gemma-2/Transformers/gemma-2-2b-it/2', 'accept'),
    ('quota', 'quota', '29.50'),
])
def test_what_may_go_wrong_is_heard_of(wrong, command, said, capfd):
    code = main(['--wrong', wrong, 'bash', '-c', f'underdog {command}'])
    output = capfd.readouterr()
    assert FAULTS[wrong][1] in output.out and said in output.out + output.err, output
    assert code == (wrong != 'quota'), output


def test_what_may_go_wrong_is_known_to_the_server(tmp_path):
    for changes, _ in FAULTS.values(): assert changes.keys() <= vars(KaggleServer(tmp_path)).keys()


def test_the_guide_names_all_that_may_go_wrong():
    assert re.findall(r'^\| `(\w+)` \|', GUIDE, re.M) == list(FAULTS)
